"""What takes bytes from outside, under any bytes: a module a protocol, whose ``check`` raises where a rule breaks.

``python -m tests.fuzz NAME`` looks for such bytes with atheris. The unit test test_fuzz_corpus.py replays corpus/NAME.
"""
