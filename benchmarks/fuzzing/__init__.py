"""The parts of the fuzzer: each makes one seeded case and tries it."""
