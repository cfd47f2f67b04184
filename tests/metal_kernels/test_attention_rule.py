"""The table that decides where the attention kernel is taken."""

from __future__ import annotations

import pytest

from mlx_diffgemma.mlx_backend.kernels.attention_rule import RULES, SIZES, family, kernel_wins, needed_share


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [
        ("applegpu_g13g", "base"),
        ("applegpu_g16s", "pro-max"),
        ("applegpu_g13c", "pro-max"),
        ("applegpu_g15d", "ultra"),
        ("applegpu_g17s", "m5"),
        ("applegpu_g18d", "m5"),
        ("applegpu_g16x", None),
        ("cpu", None),
        ("", None),
    ],
)
def test_family(architecture, kind):
    assert family(architecture) == kind


def test_the_table_is_complete_and_claims_no_measurement():
    kinds = {*SIZES.values(), "m5"}
    assert RULES.keys() == {(dim, kind) for dim in (256, 512) for kind in kinds}
    assert not any(rule.measured for rule in RULES.values())


@pytest.mark.parametrize(
    ("dim", "keys", "architecture", "wins"),
    [
        (256, 511, "applegpu_g14g", False),
        (256, 512, "applegpu_g14g", True),
        (256, 10**6, "applegpu_g16s", False),
        (512, 32767, "applegpu_g16s", False),
        (512, 32768, "applegpu_g16s", True),
        (512, 10**6, "applegpu_g17s", False),
        (64, 10**6, "applegpu_g14g", False),
        (256, 10**6, "unknown", False),
    ],
)
def test_wins_from_its_length_on(dim, keys, architecture, wins):
    assert kernel_wins(dim, keys, architecture) is wins


def test_share_of_the_rate_that_is_needed():
    assert needed_share(256, 546e9, 14.5e12) == pytest.approx(0.76, abs=0.005)
    assert needed_share(512, 546e9, 14.5e12) == pytest.approx(0.87, abs=0.005)
    assert needed_share(256, 100e9, 0.85 * 3.6e12) == pytest.approx(0.74, abs=0.005)  # an M2
