"""The Kubernetes manifests: against the schemas of Kubernetes, the restricted Pod Security Standard, and ourselves."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from controller.api.access_rules import RULES
from controller.heavy.arguments import ApplicationArguments
from controller.settings import Settings, load_settings
from core.addresses import parse_address
from edge_agent.settings import load_settings as load_agent_settings
from tests.support.dockerfile import read_dockerfile

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "kubernetes"
# The oldest and the newest that they are for.
VERSIONS = ("1.32", "1.37")
# What KubeRay 1.7.0 knows at each place that we use; its schemas are in no package. Pods are Kubernetes' own.
RAY_SERVICE = {"serveConfigV2", "rayClusterConfig", "serviceUnhealthySecondThreshold", "upgradeStrategy", "suspend"}
RAY_CLUSTER = {"rayVersion", "enableInTreeAutoscaling", "authOptions", "headGroupSpec", "workerGroupSpecs"}
RAY_HEAD = {"rayStartParams", "template"}
RAY_WORKERS = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}
# https://kubernetes.io/docs/concepts/security/pod-security-standards: `restricted`, volume types.
RESTRICTED_VOLUMES = {
    *("configMap", "csi", "downwardAPI", "emptyDir"),
    *("ephemeral", "persistentVolumeClaim", "projected", "secret"),
}


@dataclass(frozen=True, slots=True)
class Pod:
    """What a workload makes pods of."""

    workload: str
    template: dict[str, Any]

    @property
    def spec(self) -> dict[str, Any]:
        spec: dict[str, Any] = self.template["spec"]
        return spec

    @property
    def containers(self) -> list[dict[str, Any]]:
        return [*self.spec.get("initContainers", ()), *self.spec["containers"]]

    @property
    def ports(self) -> dict[str, int]:
        return {port["name"]: port["containerPort"] for each in self.containers for port in each.get("ports", ())}

    def is_selected_by(self, selector: dict[str, Any]) -> bool:
        wanted: dict[str, str] = selector.get("matchLabels", {})
        labels: dict[str, str] = self.template["metadata"]["labels"]
        return wanted.items() <= labels.items()


def documents(*folders: str) -> list[dict[str, Any]]:
    paths = [path for folder in folders for path in sorted((FOLDER / folder).glob("*.yaml"))]
    return [document for path in paths for document in yaml.safe_load_all(path.read_text())]


def objects(*folders: str, kind: str | None = None) -> list[dict[str, Any]]:
    """Return what the cluster is given: everything but what kustomize keeps for itself and patches."""
    patches = [patch["path"] for each in documents("postgresql") for patch in each.get("patches", ())]
    found = [
        document
        for folder in folders
        for path in sorted((FOLDER / folder).glob("*.yaml"))
        if path.name != "kustomization.yaml" and not (folder == "postgresql" and path.name in patches)
        for document in yaml.safe_load_all(path.read_text())
    ]
    return [each for each in found if kind in {None, each["kind"]}]


def pods_of(workload: dict[str, Any]) -> Iterator[Pod]:
    name = workload["metadata"]["name"]
    match workload["kind"]:
        case "StatefulSet" | "DaemonSet":
            yield Pod(name, workload["spec"]["template"])
        case "RayService":
            cluster = workload["spec"]["rayClusterConfig"]
            for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
                yield Pod(f"{name}/{group.get('groupName', 'head')}", group["template"])


def pods(*folders: str) -> list[Pod]:
    return [pod for workload in objects(*folders) for pod in pods_of(workload)]


def only(*folders: str, kind: str) -> dict[str, Any]:
    (found,) = objects(*folders, kind=kind)
    return found


BASE_PODS = pytest.mark.parametrize("pod", pods("base"), ids=lambda pod: pod.workload)
ALL_PODS = pytest.mark.parametrize("pod", pods("base", "edge"), ids=lambda pod: pod.workload)


# ---- schemas --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    "manifest",
    [each for each in objects("base", "edge", "postgresql") if each["kind"] != "RayService"],
    ids=lambda each: f"{each['kind']}-{each['metadata']['name']}",
)
def test_it_is_what_the_schema_of_kubernetes_says(manifest: dict[str, Any], version: str) -> None:
    assert kubernetes_validate.validate(manifest, version, strict=True) == version


def test_the_check_of_schemas_finds_what_is_wrong() -> None:
    wrong = json.loads(json.dumps(only("base", kind="StatefulSet")))
    wrong["spec"]["template"]["spec"]["containers"][0]["redinessProbe"] = {}

    with pytest.raises(kubernetes_validate.ValidationError, match="redinessProbe"):
        kubernetes_validate.validate(wrong, VERSIONS[-1], strict=True)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("pod", list(pods_of(only("base", kind="RayService"))), ids=lambda pod: pod.workload)
def test_the_pods_of_ray_are_what_the_schema_of_kubernetes_says(pod: Pod, version: str) -> None:
    template = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "ray"}, "template": pod.template}

    assert kubernetes_validate.validate(template, version, strict=True) == version


def test_the_ray_service_uses_only_what_kuberay_knows() -> None:
    service = only("base", kind="RayService")
    cluster = service["spec"]["rayClusterConfig"]

    assert service["apiVersion"] == "ray.io/v1"
    assert set(service["spec"]) <= RAY_SERVICE
    assert set(cluster) <= RAY_CLUSTER
    assert set(cluster["headGroupSpec"]) <= RAY_HEAD
    for group in cluster["workerGroupSpecs"]:
        assert set(group) <= RAY_WORKERS
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    parameters = [group["rayStartParams"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]
    assert all(isinstance(value, str) for each in parameters for value in each.values())


@pytest.mark.parametrize("folder", ["base", "edge", "postgresql"])
def test_kustomize_takes_every_file_that_is_there(folder: str) -> None:
    kustomization = yaml.safe_load((FOLDER / folder / "kustomization.yaml").read_text())
    generated = [file for each in kustomization.get("configMapGenerator", ()) for file in each["files"]]
    patches = [patch["path"] for patch in kustomization.get("patches", ())]

    taken = {"kustomization.yaml", *kustomization["resources"], *generated, *patches}
    assert taken == {path.name for path in (FOLDER / folder).iterdir()}


# ---- pods -----------------------------------------------------------------------------------------------------


@ALL_PODS
def test_pods_and_containers_are_confined_as_restricted_asks(pod: Pod) -> None:
    context = pod.spec["securityContext"]
    assert context["runAsNonRoot"]
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod.spec)
    for container in pod.containers:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }


@BASE_PODS
def test_pods_take_nothing_of_the_node(pod: Pod) -> None:
    assert {kind for volume in pod.spec["volumes"] for kind in volume if kind != "name"} <= RESTRICTED_VOLUMES
    assert not any("hostPort" in port for each in pod.containers for port in each.get("ports", ()))


def test_namespaces_enforce_what_their_pods_keep() -> None:
    levels = {
        each["metadata"]["name"]: each["metadata"]["labels"]["pod-security.kubernetes.io/enforce"]
        for each in objects("base", "edge", kind="Namespace")
    }

    assert levels == {"nanofleet": "restricted", "nanofleet-edge": "privileged"}


@ALL_PODS
def test_pods_run_as_the_user_of_our_images_and_have_no_word_in_the_cluster(pod: Pod) -> None:
    users = {
        each.words
        for name in ("agent", "controller")
        for each in read_dockerfile(ROOT / "deploy" / "images" / f"Dockerfile.{name}")
        if each.name == "USER"
    }

    assert users == {f"{pod.spec['securityContext']['runAsUser']}:{pod.spec['securityContext']['runAsGroup']}"}
    assert pod.spec["automountServiceAccountToken"] is False


@ALL_PODS
def test_every_mount_has_its_volume_and_every_container_its_bounds(pod: Pod) -> None:
    volumes = {volume["name"] for volume in pod.spec["volumes"]}
    claims = {claim["metadata"]["name"] for each in objects("base") for claim in claims_of(each)}

    for container in pod.containers:
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes | claims
        assert "memory" in container["resources"]["limits"]
        assert {"cpu", "memory"} <= set(container["resources"]["requests"])


def claims_of(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    claims: list[dict[str, Any]] = manifest["spec"].get("volumeClaimTemplates", []) if "spec" in manifest else []
    return claims


def test_selectors_select_and_ports_are_there() -> None:
    known = pods("base")
    for manifest in objects("base", "postgresql"):
        spec, kind = manifest.get("spec", {}), manifest["kind"]
        selector = spec.get("selector" if kind == "PodDisruptionBudget" else "podSelector")
        if kind not in {"PodDisruptionBudget", "NetworkPolicy"}:
            continue
        selected = [pod for pod in known if pod.is_selected_by(selector)]
        assert selected, manifest["metadata"]["name"]
        inward = [port["port"] for rule in spec.get("ingress", ()) for port in rule.get("ports", ())]
        assert set(inward) <= {name for pod in selected for name in pod.ports}
        for rule in spec.get("egress", ()):
            targets = [pod for each in rule.get("to", ()) for pod in known if pod.is_selected_by(each["podSelector"])]
            named = {port["port"] for port in rule.get("ports", ()) if isinstance(port["port"], str)}
            assert named <= {name for pod in targets for name in pod.ports}


def test_secrets_that_must_be_made_are_described() -> None:
    readme = (FOLDER / "README.md").read_text()
    names = {
        volume["secret"]["secretName"]
        for spec in (*(pod.spec for pod in pods("base", "edge")), patched()["spec"]["template"]["spec"])
        for volume in spec["volumes"]
        if "secret" in volume
    }

    assert len(names) == 4
    assert {name for name in names if f"secret generic {name} " not in readme} == set()


# ---- what our programs are told -------------------------------------------------------------------------------


def patched() -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((FOLDER / "postgresql" / "controller.yaml").read_text())
    return document


def controller_settings(monkeypatch: pytest.MonkeyPatch, environment: list[dict[str, str]]) -> Settings:
    monkeypatch.setenv("NANOFLEET_DATA_DIR", "/var/lib/nanofleet")
    for variable in environment:
        monkeypatch.setenv(variable["name"], variable["value"])
    return load_settings(FOLDER / "base" / "controller.toml")


def test_the_controller_listens_where_its_service_leads(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = controller_settings(monkeypatch, [])
    binds = {"grpc": settings.grpc_bind, "enrolment": settings.enrolment_bind, "https": settings.http_bind}
    bound = {name: parse_address(bind).port for name, bind in binds.items()}

    (pod,) = pods_of(only("base", kind="StatefulSet"))
    assert pod.ports == bound
    ports = only("base", kind="Service")["spec"]["ports"]
    assert {port["targetPort"]: port["port"] for port in ports} == bound
    assert settings.http_speaks_tls


def test_probes_ask_what_anybody_may_ask() -> None:
    (container,) = only("base", kind="StatefulSet")["spec"]["template"]["spec"]["containers"]
    asked = {container[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "liveness", "readiness")}

    assert asked == {"/v2/health/live", "/api/health"}
    open_to_all = RULES["/v2/health/live"]["GET"]
    assert {RULES[path]["GET"] for path in asked} == {open_to_all}
    assert RULES["/api/models"]["GET"] != open_to_all


def test_the_component_gives_the_controller_a_database(monkeypatch: pytest.MonkeyPatch) -> None:
    (container,) = patched()["spec"]["template"]["spec"]["containers"]
    settings = controller_settings(monkeypatch, container["env"])

    (mount,) = container["volumeMounts"]
    assert settings.database_url.startswith("postgresql+psycopg://")
    assert f"sslrootcert={mount['mountPath']}/ca.crt" in settings.database_url
    assert str(settings.database_password_file) == f"{mount['mountPath']}/password"
    assert patched()["metadata"]["name"] == only("base", kind="StatefulSet")["metadata"]["name"]


SERVE = """
import json, sys
from ray.serve.schema import ServeDeploySchema
print(ServeDeploySchema.model_validate(json.load(sys.stdin)).model_dump_json(exclude_unset=True))
"""


def test_ray_serve_and_our_application_take_what_they_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    service = only("base", kind="RayService")
    config = yaml.safe_load(service["spec"]["serveConfigV2"])

    taken = subprocess.run([sys.executable, "-c", SERVE], input=json.dumps(config), capture_output=True, text=True)
    assert taken.returncode == 0, taken.stderr
    (application,) = json.loads(taken.stdout)["applications"]
    assert application["import_path"] == "controller.heavy.application:build"
    arguments = ApplicationArguments(**application["args"])
    ports = {port["name"]: port["port"] for port in only("base", kind="Service")["spec"]["ports"]}
    assert arguments.controller == f"{only('base', kind='Service')['metadata']['name']}:{ports['grpc']}"
    for pod in pods_of(service):
        mounted = {mount["mountPath"] for mount in pod.containers[0]["volumeMounts"]}
        assert {str(arguments.tls_dir), str(arguments.cache_dir)} <= mounted
    # KubeRay names the Service after the RayService.
    url = f"http://{service['metadata']['name']}-serve-svc:{config['http_options']['port']}"
    assert controller_settings(monkeypatch, []).heavy.url == url


def test_the_version_of_ray_is_that_of_the_image() -> None:
    lock = (ROOT / "deploy" / "requirements" / "controller.lock").read_text()
    pinned = re.search(r"^ray==(\S+)", lock, re.MULTILINE)

    assert pinned is not None
    assert only("base", kind="RayService")["spec"]["rayClusterConfig"]["rayVersion"] == pinned[1]


def test_the_agent_finds_the_broker_in_its_pod(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOFLEET_AGENT_STATE_DIR", "/var/lib/nanofleet-agent")
    settings = load_agent_settings(FOLDER / "edge" / "agent.toml")

    (pod,) = pods_of(only("edge", kind="DaemonSet"))
    assert settings.mqtt.host == "localhost"
    assert settings.mqtt.port == pod.ports["mqtts"]
