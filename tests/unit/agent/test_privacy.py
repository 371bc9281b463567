"""Privacy classes: of models, devices and requests the strictest counts, and what is no class is refused."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import Forbidden
from core.open_inference.service import Call
from edge_agent.cascade.policy import Privacy, Reason, strictest
from edge_agent.cascade.privacy import PrivacyRules
from edge_agent.data_plane import EdgeDataPlane
from edge_agent.runtime.pool import LoadedModel
from edge_agent.terms import Terms
from tests.support.edge_plane import UNSURE, FakeHeavy, cascade_of, echo_manifest, echo_model, plane_with, request_of

DEVICE, SITE, ANY = Privacy.DEVICE, Privacy.SITE, Privacy.ANY
CLASSES = st.sampled_from(list(Privacy))


def class_of(
    rules: PrivacyRules, *, client: str = "", beside: str | None = None, declared: str | None = None, **within: Any
) -> Privacy:
    manifest = echo_manifest().model_copy(update={"privacy": declared})
    return rules.privacy_of(request_of(**within), manifest, beside=beside, client=client)


@given(CLASSES, CLASSES, CLASSES, CLASSES, CLASSES)
def test_the_strictest_class_counts_whoever_says_it(
    within: Privacy, beside: Privacy, declared: Privacy, of_model: Privacy, of_device: Privacy
) -> None:
    rules = PrivacyRules(models={"digits": of_model}, devices={"camera-1": of_device})
    found = class_of(rules, client="camera-1", beside=beside.value, declared=declared.value, privacy=within.value)
    assert found is strictest(within, beside, declared, of_model, of_device)


def test_without_a_word_from_anybody_data_may_go_anywhere() -> None:
    assert class_of(PrivacyRules(), client="camera-1") is ANY


@pytest.mark.parametrize(
    ("client", "expected"),
    [
        ("camera-1", SITE),
        ("ward-7", DEVICE),
        ("ward-7@berlin", DEVICE),
        ("ward-lab", DEVICE),
        ("lab-1", ANY),
        ("lab-12", SITE),
        ("", SITE),
    ],
)
def test_a_device_has_the_class_of_its_name_or_pattern_or_the_default(client: str, expected: Privacy) -> None:
    rules = PrivacyRules(default=SITE, devices={"ward-*": DEVICE, "*-lab": ANY, "lab-?": ANY})
    assert class_of(rules, client=client) is expected


def test_a_name_is_not_a_pattern_of_another_alphabet() -> None:
    rules = PrivacyRules(devices={"camera.1": DEVICE})
    assert [class_of(rules, client=client) for client in ("camera.1", "cameraX1")] == [DEVICE, ANY]


def test_a_rule_for_one_model_leaves_the_others_alone() -> None:
    assert class_of(PrivacyRules(models={"faces": DEVICE})) is ANY


@pytest.mark.parametrize("where", ["beside", "within"])
def test_a_word_that_is_no_class_refuses(where: str) -> None:
    words = {"beside": {"beside": "public"}, "within": {"privacy": "public"}}[where]
    with pytest.raises(Forbidden, match="expected device, site or any"):
        class_of(PrivacyRules(default=DEVICE), **words)


def test_more_devices_than_are_remembered_each_have_their_class() -> None:
    rules = PrivacyRules(devices={"ward-*": DEVICE})
    for number in range(10_000):
        assert class_of(rules, client=f"ward-{number}") is DEVICE


async def plane_of(model: LoadedModel, rules: PrivacyRules, heavy: FakeHeavy) -> EdgeDataPlane:
    return await plane_with(model, heavy=heavy, privacy=rules)


@pytest.mark.parametrize(
    "rules",
    [PrivacyRules(default=SITE), PrivacyRules(models={"digits": DEVICE}), PrivacyRules(devices={"camera-*": SITE})],
    ids=["default", "model", "device"],
)
async def test_a_request_cannot_lower_what_a_rule_has_set(rules: PrivacyRules) -> None:
    heavy = FakeHeavy()
    plane = await plane_of(echo_model(cascade=cascade_of()), rules, heavy)
    terms = Terms("camera-1", privacy="any")
    answer = await plane.ask(request_of(UNSURE, privacy="any"), Call(), terms)
    assert (answer.reason, heavy.asked) == (Reason.PRIVACY, [])


async def test_a_model_whose_manifest_keeps_its_data_at_the_site_does_not_escalate() -> None:
    heavy = FakeHeavy()
    model = echo_model(cascade=cascade_of())
    model.manifest = model.manifest.model_copy(update={"privacy": "site"})
    plane = await plane_of(model, PrivacyRules(), heavy)
    assert (await plane.ask(request_of(UNSURE), Call())).reason is Reason.PRIVACY
    assert heavy.asked == []
