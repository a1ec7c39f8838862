"""Seeded fuzzing: random cases, judged by code that shares nothing with demur."""
