"""The kernels of the weighted activation on a GPU against fp64."""

import pytest
from unit_tests.experts.test_activation_kernels import DTYPES, KINDS, Case, check

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("last", [0, 1, 900, 1024])
def test_within_half_a_unit_of_the_exact_result(kind: str, name: str, last: int) -> None:
    case = Case(kind, DTYPES[name], rows=1024, width=776, last=last)
    for field in ("hidden", "probs", "grad", "ends"):
        setattr(case, field, getattr(case, field).cuda())
    check(case)
