"""What an agent shall run: the most specific target wins, whatever the order."""

from random import Random

from hypothesis import given
from hypothesis import strategies as st

from controller.fleet.model import WHOLE_FLEET, Deployment, Target, TargetKind
from controller.fleet.resolution import resolve
from core.ids import AgentId, ModelName, SiteId
from tests.support.fleet_values import CAM, CAT, METER, NORTH, SOUTH, at_agent, at_site, made_deployment, made_slot

AGENTS = [AgentId("a"), AgentId("b")]
SITES = [NORTH, SOUTH]
MODELS = [ModelName("m1"), ModelName("m2"), ModelName("m3")]

targets = st.one_of(
    st.just(WHOLE_FLEET),
    st.sampled_from(SITES).map(at_site),
    st.sampled_from(AGENTS).map(at_agent),
)
# As the store holds them: one for each target and model.
deployments = st.lists(
    st.builds(
        lambda target, model, version: made_deployment(target, made_slot(model, version)),
        targets,
        st.sampled_from(MODELS),
        st.integers(1, 5),
    ),
    unique_by=lambda deployment: (deployment.target, deployment.slot.model),
)


def specificity(deployment: Deployment) -> int:
    return [TargetKind.FLEET, TargetKind.SITE, TargetKind.AGENT].index(deployment.target.kind)


def test_without_deployments_nothing_runs() -> None:
    assert resolve([], CAM, NORTH) == ()


def test_a_deployment_to_another_site_or_agent_does_not_count() -> None:
    others = [made_deployment(at_site(SOUTH)), made_deployment(at_agent(AgentId("cam-2")))]

    assert resolve(others, CAM, NORTH) == ()


def test_a_site_that_is_called_like_the_agent_is_not_the_agent() -> None:
    assert resolve([made_deployment(Target(TargetKind.SITE, CAM))], CAM, NORTH) == ()


def test_different_models_add_up() -> None:
    fleet = made_deployment(WHOLE_FLEET, made_slot(METER))
    site = made_deployment(at_site(NORTH), made_slot(CAT))

    assert resolve([fleet, site], CAM, NORTH) == (made_slot(CAT), made_slot(METER))


@given(deployments, st.sampled_from(AGENTS), st.sampled_from(SITES))
def test_each_model_runs_as_its_most_specific_target_says(
    given_deployments: list[Deployment], agent_id: AgentId, site: SiteId
) -> None:
    slots = resolve(given_deployments, agent_id, site)

    covering = [each for each in given_deployments if each.target.covers(agent_id, site)]
    assert {slot.model for slot in slots} == {each.slot.model for each in covering}
    for slot in slots:
        rivals = [each for each in covering if each.slot.model == slot.model]
        assert max(rivals, key=specificity).slot == slot


@given(deployments, st.sampled_from(AGENTS), st.randoms())
def test_the_result_is_sorted_and_the_order_of_deployments_does_not_matter(
    given_deployments: list[Deployment], agent_id: AgentId, random: Random
) -> None:
    shuffled = list(given_deployments)
    random.shuffle(shuffled)

    slots = resolve(given_deployments, agent_id, NORTH)

    assert resolve(shuffled, agent_id, NORTH) == slots
    assert [slot.model for slot in slots] == sorted(slot.model for slot in slots)
