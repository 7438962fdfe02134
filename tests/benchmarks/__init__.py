"""Benchmarks: ``python -m tests.benchmarks``; see docs/benchmarks.md. No timing decides a test."""
