"""The tests. tests/support has what they share; its asserts are explained as those of tests are."""

import pytest

pytest.register_assert_rewrite("tests.support")
