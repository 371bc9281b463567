"""What may be installed once the manifest is here, and how little the agent's main process loads for it."""

import subprocess
import sys
from pathlib import Path

import pytest

from core.errors import Untrusted
from edge_agent.trust.terms import AdmittedManifests, ManifestTerms
from tests.support.trusting_device import release_of

MADE, OTHER = release_of(1), release_of(2)
TERMS = ManifestTerms(length_bytes=100, release_floor=1, tags=frozenset())


def test_an_admitted_manifest_that_fulfils_its_terms_may_be_installed() -> None:
    admitted = AdmittedManifests(in_force=[])
    admitted.admit({MADE.digest: TERMS}, running=[])
    admitted.require(MADE.manifest, MADE.slot)


def test_what_was_in_force_before_may_be_installed_again_whatever_the_floor() -> None:
    admitted = AdmittedManifests(in_force=[MADE.digest])
    admitted.require(MADE.manifest, MADE.slot)
    admitted.admit({OTHER.digest: TERMS}, running=[MADE.digest])
    admitted.require(MADE.manifest, MADE.slot)


def test_the_next_admission_takes_the_place_of_the_last_one() -> None:
    admitted = AdmittedManifests(in_force=[])
    admitted.admit({MADE.digest: TERMS}, running=[])
    admitted.admit({OTHER.digest: TERMS}, running=[])
    with pytest.raises(Untrusted):
        admitted.require(MADE.manifest, MADE.slot)


def test_the_main_process_loads_neither_tuf_nor_cryptography(tmp_path: Path) -> None:
    script = (
        "import sys, edge_agent.trust.desk, edge_agent.trust.gate, edge_agent.trust.terms; "
        "print(sorted({'tuf', 'securesystemslib', 'cryptography'}.intersection(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
