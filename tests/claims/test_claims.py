"""The kernel's own claims hold on simulated machines, and on the running kernel; their table is as the results say."""

import json

import pytest

from pmcore import spec
from pmcore.errors import BackendUnavailable, FormatError
from pmcore.registry import open_workbench
from tests.claims.claims import ABSENT, FAILS, NOT_MODELLED, PASSES, POOL, load, try_claim
from tests.claims.run import CASES, RESULTS, SIMULATED, STATED, TABLE, table

CLAIMS = sorted(STATED.glob("*.json"))
#: What the simulated machine says of the claims that it cannot try.
UNMODELLED: set[str] = set()


def test_each_case_of_the_selftests_is_stated():
    stated = {}
    for claim in map(load, CLAIMS):
        for expectation in claim.expect:
            stated.setdefault(claim.of, set()).update(expectation.cases)
    assert stated == {of: set(range(1, count + 1)) for of, count in CASES.items()}


@pytest.mark.parametrize("path", CLAIMS, ids=lambda path: path.stem)
def test_claims_name_rules_and_capabilities_that_there_are(path):
    claim = load(path)
    assert {rule for e in claim.expect for rule in e.rules} | {*claim.program.rules} <= spec.rules().keys()
    assert {*claim.needs} <= spec.features().keys()


@pytest.mark.parametrize("kernel", SIMULATED)
@pytest.mark.parametrize("path", CLAIMS, ids=lambda path: path.stem)
def test_the_simulated_machine_keeps_the_claim(path, kernel):
    """Or there is a reason: what its kernel does not have, and what is not modelled of files."""
    claim = load(path)
    with open_workbench("sim", memory="256 MiB", kernel=kernel, hugepages=POOL) as bench:
        told = try_claim(claim, bench)
        assert len(told) == len(claim.expect)
        assert not [(t.expectation.says, t.why) for t in told if t.outcome == FAILS]
        absent = claim.missing(bench.kernel.profile)
        assert all((t.outcome == ABSENT) is bool(absent) for t in told)
        assert {t.why for t in told if t.outcome == NOT_MODELLED} <= UNMODELLED


@pytest.mark.parametrize("name", ["6.18", "6.12", "6.1"])
def test_the_kernels_kept_each_claim_that_they_have_the_features_for(name):
    told = json.loads((RESULTS / f"{name}.json").read_text())["told"]
    assert told.keys() == {path.stem for path in CLAIMS}
    assert {outcome for rows in told.values() for outcome, _ in rows} <= {PASSES, ABSENT}


def test_a_claim_that_does_not_hold_is_found(tmp_path):
    data = json.loads((STATED / "scan-two-mappings.json").read_text())
    data["expect"][0]["regions"] = [[0, 999, 2]]
    path = tmp_path / "wrong.json"
    path.write_text(json.dumps(data))
    with open_workbench("sim", memory="256 MiB", kernel="6.18") as bench:
        told = try_claim(load(path), bench)
    assert [t.outcome for t in told] == [FAILS]
    assert "[0, 1000, 2]" in told[0].why


@pytest.mark.parametrize("change", [{"step": 99}, {"colour": "red"}, {"says": None}])
def test_what_is_no_claim_is_refused(tmp_path, change):
    data = json.loads((STATED / "scan-two-mappings.json").read_text())
    data["expect"][0].update(change)
    if change == {"says": None}:
        del data["expect"][0]["says"]
    path = tmp_path / "wrong.json"
    path.write_text(json.dumps(data))
    with pytest.raises(FormatError):
        load(path)


def test_the_table_is_made_of_the_results():
    assert TABLE.read_text(encoding="utf-8") == table(), "python tests/claims/run.py writes it"


@pytest.mark.live
@pytest.mark.xdist_group("live")
def test_the_running_kernel_keeps_the_claims():
    try:
        bench = open_workbench("procfs", still=True, hugepages=POOL)
    except BackendUnavailable as error:
        pytest.skip(str(error))
    with bench:
        for path in CLAIMS:
            bench.renew()
            told = try_claim(load(path), bench)
            assert not [(path.stem, t.expectation.says, t.why) for t in told if t.outcome == FAILS]
