"""One module for each format of foreign bytes. Its ``check`` takes any bytes, and raises if a rule is broken.

``python -m tests.fuzz NAME`` looks for such bytes with atheris. The unit test test_fuzz_corpus.py replays corpus/NAME.
"""
