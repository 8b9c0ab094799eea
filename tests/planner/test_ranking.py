"""The planner's order of meshes by memory is the compilers': against figures that they gave, and one asked again."""

import pytest

from benchmarks import planner_ranking as ranking
from tbjax.planner.compilers import installed
from tbjax.planner.verify import verify

KEPT = ranking.read()
COMPILED = [scenario for scenario in ranking.SCENARIOS if any(title == scenario.title for title, _ in KEPT)]


@pytest.mark.parametrize("scenario", COMPILED, ids=lambda scenario: scenario.title)
def test_meshes_that_the_compiler_tells_apart_stand_in_its_order(scenario):
    """Of all pairs whose compiled totals differ by 2 % or more."""
    found = ranking.compared(scenario, KEPT)
    assert len(found) == sum(title == scenario.title for title, _ in KEPT)
    assert len(found) >= 5
    wrong, pairs = ranking.turned(found)
    assert wrong == 0, f"{wrong} of {pairs} pairs"
    least = min(found, key=lambda one: one.predicted)
    assert least.compiled <= (1 + ranking.LEVEL) * found[0].compiled


def test_a_turned_pair_and_a_level_one_are_told_apart():
    def one(predicted, compiled):
        return ranking.Compared(ranking.Layout(), predicted, compiled)

    assert ranking.turned([one(1, 100), one(2, 101)]) == (0, 0)  # level
    assert ranking.turned([one(2, 100), one(1, 110)]) == (1, 1)
    assert ranking.tau([one(1, 100), one(2, 110), one(3, 120)]) == 1
    assert ranking.tau([one(3, 100), one(2, 110), one(1, 120)]) == -1


@pytest.mark.slow
@pytest.mark.skipif(not installed("cuda"), reason="the CUDA plugin is not installed: tbjax[verify]")
def test_a_scenario_compiled_again_gives_what_was_kept():
    scenario = ranking.SCENARIOS[0]
    config, workload, where = scenario.inputs()
    for layout in list(ranking.fitting(scenario))[::3]:
        again = verify(config, workload, layout, where).compiled.total
        assert again == pytest.approx(KEPT[scenario.title, tuple(layout.mesh.values())], rel=0.01)
