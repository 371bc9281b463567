"""A real model published for real: SQLite, blobs on disk, and every step in a child process."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from onnx import helper

from controller.compression.model import RECIPES
from controller.compression.workshop import ChildWorkshop
from controller.registry.model import BundleFile, CascadeRequest, PublicationState, PublishRequest
from controller.storage.database import Database
from controller.storage.registry import SqlRegistryStore
from core.digest import Digest, digest_of_file
from core.fleet_state import Problem
from core.ids import ModelName
from core.manifest import ScoreKind
from edge_agent.activation.self_test import SelfTester, SelfTestLimits
from tests.support.onnx_models import conv_net, dense_net, digits, external_weights, model_of
from tests.support.registries import RunningRegistry, running_registry

METER = ModelName("meter")


@pytest.fixture
async def running(tmp_path: Path) -> AsyncIterator[RunningRegistry]:
    database = Database(f"sqlite:///{tmp_path / 'test.sqlite'}")
    await database.migrate()
    workshop = ChildWorkshop(timeout_s=120, memory_bytes=1 << 30, max_file_bytes=1 << 28)
    async with running_registry(tmp_path, workshop, store=SqlRegistryStore(database)) as running:
        yield running
    await database.close()


async def digits_request(running: RunningRegistry) -> PublishRequest:
    return PublishRequest(
        file=BundleFile("model.onnx", await running.upload(digits().model)),
        calibration=await running.upload(digits().calibration),
        evaluation=await running.upload(digits().evaluation),
        recipes=RECIPES,
        max_batch=32,
        cascade=CascadeRequest(ModelName("large"), "probabilities", ScoreKind.PROBABILITIES, 0.01),
    )


async def refusal(running: RunningRegistry, request: PublishRequest) -> Problem:
    failed = await running.finished(await running.registry.start_publication(METER, request))
    assert failed.state is PublicationState.FAILED
    assert failed.problem is not None
    return failed.problem


async def test_a_classifier_is_published_with_every_recipe(running: RunningRegistry) -> None:
    request = await digits_request(running)

    finished = await running.finished(await running.registry.start_publication(METER, request))

    assert (finished.state, finished.problem) == (PublicationState.DONE, None)
    version = await running.registry.version(METER, 1)
    original, *derived = version.variants
    assert [variant.variant for variant in version.variants] == ["original", *sorted(RECIPES)]
    for variant in version.variants:
        measured, cascade = variant.measured, variant.manifest.cascade
        sizes_bytes = [await running.registry.blob_size(Digest(file.digest)) for file in variant.manifest.files]
        assert measured.size_bytes == sum(sizes_bytes)
        assert measured.accuracy_ratio == pytest.approx(original.measured.accuracy_ratio, abs=0.01)
        assert measured.evaluated_samples == 898
        assert 0 < measured.latency_p50_us <= measured.latency_p90_us
        assert cascade is not None
        assert 0 < cascade.threshold < 1
        assert cascade.escalate_to == "large"
        assert digest_of_file(running.blobs.path(variant.manifest_digest)) == variant.manifest_digest
    assert all(variant.measured.size_bytes < original.measured.size_bytes for variant in derived)


async def test_a_model_with_external_weights_is_published(running: RunningRegistry) -> None:
    model = dense_net()
    weights = await running.upload(external_weights(model, "weights.bin"))
    file = BundleFile("sub/model.onnx", await running.upload(model.SerializeToString()))
    request = PublishRequest(file, (BundleFile("sub/weights.bin", weights),), recipes=("fp16", "int8-dynamic"))

    finished = await running.finished(await running.registry.start_publication(METER, request))

    assert finished.problem is None
    original = (await running.registry.latest(METER)).variants[0]
    assert [file.path for file in original.manifest.files] == ["sub/model.onnx", "sub/weights.bin", "golden.npz"]


async def test_every_variant_keeps_what_is_not_external_data_and_requires_its_tags_and_privacy(
    running: RunningRegistry,
) -> None:
    model = dense_net()
    extra_files = (
        BundleFile("weights.bin", await running.upload(external_weights(model, "weights.bin"))),
        BundleFile("tokenizer.json", await running.upload(b"{}")),
    )
    file = BundleFile("model.onnx", await running.upload(model.SerializeToString()))
    request = PublishRequest(file, extra_files, recipes=("int8-dynamic",), requires=("arch:x86_64",), privacy="site")

    finished = await running.finished(await running.registry.start_publication(METER, request))

    assert finished.problem is None
    original, derived = (await running.registry.latest(METER)).variants
    of_original = ["model.onnx", "weights.bin", "tokenizer.json", "golden.npz"]
    assert [file.path for file in original.manifest.files] == of_original
    assert [file.path for file in derived.manifest.files] == ["model.onnx", "tokenizer.json", "golden.npz"]
    assert derived.manifest.requires == original.manifest.requires == ("arch:x86_64",)
    assert derived.manifest.privacy == original.manifest.privacy == "site"


async def test_every_variant_passes_the_self_test_that_it_was_published_with(
    running: RunningRegistry, tmp_path: Path
) -> None:
    await running.finished(await running.registry.start_publication(METER, await digits_request(running)))
    for variant in (await running.registry.version(METER, 1)).variants:
        manifest, folder = variant.manifest, tmp_path / variant.variant
        for file in manifest.files:
            await running.blobs.copy(Digest(file.digest), folder / file.path)
        result = await SelfTester(SelfTestLimits()).test(manifest, folder)
        assert manifest.self_test is not None
        assert manifest.self_test.max_latency_p95_ms == 50.0
        assert result.problem is None
        assert result.latency_p95_ms is not None
        assert manifest.accuracy_ratio == variant.measured.accuracy_ratio


async def test_a_recipe_that_does_not_fit_fails_the_publication(running: RunningRegistry) -> None:
    request = await running.request(conv_net().SerializeToString())

    problem = await refusal(running, replace(request, recipes=("int8-dynamic",)))

    assert problem.message.startswith("recipe int8-dynamic: refused for a model with convolutions")


async def test_a_file_that_is_not_onnx_is_refused(running: RunningRegistry) -> None:
    assert "expected an ONNX file" in (await refusal(running, await running.request(b"GIF89a"))).message


async def test_a_custom_operator_is_refused(running: RunningRegistry) -> None:
    node = helper.make_node("Run", ["x"], ["y"], domain="evil")
    model = model_of([node], inputs={"x": [1]}, outputs={"y": [1]}, domains=("evil",))

    problem = await refusal(running, await running.request(model.SerializeToString()))

    assert "operator evil:Run is not accepted" in problem.message


async def test_external_data_that_escapes_is_refused(running: RunningRegistry) -> None:
    model = dense_net()
    external_weights(model, "../../../etc/passwd")

    problem = await refusal(running, await running.request(model.SerializeToString()))

    assert "is not among the extra files" in problem.message


async def test_a_pickled_data_set_is_refused(running: RunningRegistry) -> None:
    data = await running.upload(b"\x80\x04N.")

    problem = await refusal(running, replace(await digits_request(running), evaluation=data))

    assert "expected an .npz file" in problem.message


async def test_a_data_set_of_another_model_is_refused(running: RunningRegistry) -> None:
    request = await running.request(dense_net().SerializeToString())
    data = await running.upload(digits().evaluation)

    problem = await refusal(running, replace(request, evaluation=data))

    assert "expected inputs of shape ['n', 8], got [898, 64]" in problem.message


async def test_a_stop_kills_the_child_and_the_next_start_says_so(running: RunningRegistry, tmp_path: Path) -> None:
    started = await running.registry.start_publication(METER, await digits_request(running))
    async with asyncio.timeout(60):
        while started.stage == "queued":
            started = await running.registry.next_change(started, timeout_s=60)

    await running.stop()

    async with running_registry(tmp_path, store=running.store) as again:
        found = await again.registry.publication(started.id)
    assert found.problem is not None
    assert found.problem.message == "interrupted by a restart; publish again"
