"""The papers as experiments of version 1."""
