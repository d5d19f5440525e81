"""What deploy/kubernetes and deploy/helm render to: valid for Kubernetes, within restricted pod security, in step with the server's
settings, and the same from both.

Each policy is a function that says what is wrong with a rendered set; each is shown a set that breaks it.
"""

from __future__ import annotations

import copy
import functools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import installed
import kubernetes_validate
import pytest
import yaml

from engram_service.protocols.engram.health import LIVENESS
from engram_service.settings import Settings

DEPLOY = pathlib.Path(__file__).resolve().parents[2] / "deploy"
ROOT, CHART = DEPLOY / "kubernetes", DEPLOY / "helm" / "engram"
OVERLAYS = ("dev", "gpu", "production")
VERSIONS = ("1.29", "1.33")  # of Kubernetes: objects are to be good for both
SECRETS = {"engram-redis", "engram-tokens", "engram-tls"}  # which an operator makes
PRE_STOP_S = 5

run = functools.partial(installed.run, hint="tools/kubernetes_tools.py gets it where there is a package")

Objects = list[dict[str, Any]]


def values_of(overlay: str) -> tuple[str | pathlib.Path, ...]:
    return ("--values", CHART.parent / f"{overlay}.yaml")


def rendered(by: str, overlay: str) -> Objects:
    """All that an overlay, or the chart with the values of this name, renders to."""
    if by == "kustomize":
        done = run("kubectl", "kustomize", ROOT / "overlays" / overlay)
    else:
        done = run("helm", "template", "engram", CHART, *values_of(overlay))
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


@pytest.fixture(
    scope="module", params=[(by, overlay) for by in ("kustomize", "helm") for overlay in OVERLAYS], ids="-".join
)
def objects(request: pytest.FixtureRequest) -> Objects:
    return rendered(*request.param)


def of_kind(objects: Objects, kind: str) -> Objects:
    return [one for one in objects if one["kind"] == kind]


def pods(objects: Objects) -> Iterator[dict[str, Any]]:
    for one in of_kind(objects, "Deployment"):
        yield one["spec"]["template"]["spec"]


def containers(objects: Objects) -> Iterator[dict[str, Any]]:
    for pod in pods(objects):
        yield from pod["containers"]
        yield from pod.get("initContainers", ())


def settings(objects: Objects) -> dict[str, str]:
    (found,) = (one["data"] for one in of_kind(objects, "ConfigMap"))
    return dict(found)


# Policies


def restricted(objects: Objects) -> Iterator[str]:
    """The restricted profile of the pod security standards, and a read-only root."""
    for pod in pods(objects):
        context = pod.get("securityContext", {})
        if not context.get("runAsNonRoot") or not context.get("runAsUser"):
            yield "may run as root"
        if context.get("seccompProfile", {}).get("type") not in ("RuntimeDefault", "Localhost"):
            yield "no seccomp profile"
        if any(pod.get(name) for name in ("hostNetwork", "hostPID", "hostIPC")):
            yield "shares the host's namespaces"
        if any(set(volume) - {"name", "emptyDir", "secret", "configMap", "projected"} for volume in pod["volumes"]):
            yield "a volume of another kind"
        if pod.get("automountServiceAccountToken") is not False:
            yield "mounts a token"
    for container in containers(objects):
        context = container.get("securityContext", {})
        if context.get("allowPrivilegeEscalation") is not False or context.get("privileged"):
            yield "may gain privileges"
        if context.get("capabilities", {}).get("drop") != ["ALL"] or context.get("capabilities", {}).get("add"):
            yield "keeps capabilities"
        if not context.get("readOnlyRootFilesystem"):
            yield "may write to its root"


def resourced(objects: Objects) -> Iterator[str]:
    for container in containers(objects):
        resources = container.get("resources", {})
        if not {"cpu", "memory"} <= set(resources.get("requests", {})) or "memory" not in resources.get("limits", {}):
            yield "no requests, or no limit of memory"
        limits = resources.get("limits", {})
        if limits.get("nvidia.com/gpu") != resources.get("requests", {}).get("nvidia.com/gpu"):
            yield "GPUs are asked for and limited alike"


def drained(objects: Objects) -> Iterator[str]:
    drain_s = int(settings(objects)["ENGRAM_DRAIN_TIMEOUT_S"])
    for pod in pods(objects):
        if pod["terminationGracePeriodSeconds"] < PRE_STOP_S + drain_s + 5:
            yield "is killed before it has drained"
        (engram,) = pod["containers"]
        if engram["lifecycle"]["preStop"]["exec"]["command"] != ["sleep", str(PRE_STOP_S)]:
            yield "does not wait until nobody is sent to it any more"
        if not {"startupProbe", "readinessProbe", "livenessProbe"} <= set(engram):
            yield "a probe is missing"
        ready, *alive = (engram.get(f"{what}Probe", {}) for what in ("readiness", "liveness", "startup"))
        for probe in alive:
            if probe.get("grpc", {}).get("service") != LIVENESS and probe.get("httpGet", {}).get("path") != "/healthz":
                yield "is restarted while Redis is away"
        if ready.get("grpc", {}).get("service") or ready.get("httpGet", {}).get("path", "/readyz") != "/readyz":
            yield "is sent to while it can do nothing"


def selected(objects: Objects) -> Iterator[str]:
    """Whoever selects pods selects these."""
    for one in of_kind(objects, "Deployment"):
        labels = one["spec"]["template"]["metadata"]["labels"].items()
        chosen = [service["spec"]["selector"] for service in of_kind(objects, "Service")]
        chosen += [one["spec"]["selector"]["matchLabels"]]
        chosen += [other["spec"]["selector"]["matchLabels"] for other in of_kind(objects, "PodDisruptionBudget")]
        chosen += [policy["spec"]["podSelector"]["matchLabels"] for policy in of_kind(objects, "NetworkPolicy")]
        chosen += [
            spread["labelSelector"]["matchLabels"]
            for spread in one["spec"]["template"]["spec"]["topologySpreadConstraints"]
        ]
        if len(chosen) < 7 or not all(selector and selector.items() <= labels for selector in chosen):
            yield "a selector finds no pod"


def known(objects: Objects) -> Iterator[str]:
    """Settings are the server's, secrets are referred to and never written down."""
    names = set(settings(objects)) | {
        env["name"] for container in containers(objects) for env in container.get("env", ()) if env["name"] != "POD_IP"
    }
    if wrong := {name for name in names if name.removeprefix("ENGRAM_").lower() not in Settings.__dataclass_fields__}:
        yield f"no such settings: {wrong}"
    if of_kind(objects, "Secret"):
        yield "a secret is written down"
    text = yaml.safe_dump_all(objects)
    for pod in pods(objects):
        used = {volume["secret"]["secretName"] for volume in pod["volumes"] if "secret" in volume}
        used |= {
            env["valueFrom"]["secretKeyRef"]["name"]
            for container in pod["containers"]
            for env in container["env"]
            if "secretKeyRef" in env.get("valueFrom", {})
        }
        if not used <= SECRETS:
            yield f"secrets that nobody is told to make: {used - SECRETS}"
    if "redis://:" in text or "BEGIN" in text:
        yield "a secret is written down"


POLICIES = (restricted, resourced, drained, selected, known)


@pytest.mark.parametrize("version", VERSIONS)
def test_every_object_is_valid(objects: Objects, version: str) -> None:
    assert len(objects) >= 7
    for one in objects:
        kubernetes_validate.validate(one, version, strict=True)


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.__name__)
def test_policies_hold(objects: Objects, policy: Callable[[Objects], Iterator[str]]) -> None:
    assert list(policy(objects)) == []


def _pod(objects: Objects) -> dict[str, Any]:
    return next(pods(objects))


def _container(objects: Objects) -> dict[str, Any]:
    container: dict[str, Any] = _pod(objects)["containers"][0]
    return container


BREAKS: dict[str, tuple[Callable[[Objects], Iterator[str]], Callable[[Objects], object]]] = {
    "root": (restricted, lambda them: _pod(them)["securityContext"].pop("runAsNonRoot")),
    "seccomp": (restricted, lambda them: _pod(them)["securityContext"].pop("seccompProfile")),
    "host": (restricted, lambda them: _pod(them).update(hostNetwork=True)),
    "volume": (restricted, lambda them: _pod(them)["volumes"].append({"name": "x", "hostPath": {"path": "/"}})),
    "token": (restricted, lambda them: _pod(them).pop("automountServiceAccountToken")),
    "privileges": (restricted, lambda them: _container(them)["securityContext"].update(allowPrivilegeEscalation=True)),
    "capabilities": (restricted, lambda them: _container(them)["securityContext"]["capabilities"].update(add=["NET_RAW"])),
    "writable": (restricted, lambda them: _container(them)["securityContext"].pop("readOnlyRootFilesystem")),
    "resources": (resourced, lambda them: _container(them)["resources"].pop("limits")),
    "grace": (drained, lambda them: _pod(them).update(terminationGracePeriodSeconds=20)),
    "probe": (drained, lambda them: _container(them).pop("readinessProbe")),
    "restart": (drained, lambda them: _container(them).update(livenessProbe=_container(them)["readinessProbe"])),
    "ready": (drained, lambda them: _container(them).update(readinessProbe=_container(them)["livenessProbe"])),
    "selector": (selected, lambda them: of_kind(them, "PodDisruptionBudget")[0]["spec"]["selector"]["matchLabels"].update(a="b")),
    "setting": (known, lambda them: of_kind(them, "ConfigMap")[0]["data"].update(ENGRAM_TYPO="1")),
    "secret": (known, lambda them: them.append({"kind": "Secret", "metadata": {"name": "x"}})),
}  # fmt: skip


@pytest.mark.parametrize("what", BREAKS)
def test_policies_can_fail(objects: Objects, what: str) -> None:
    policy, spoil = BREAKS[what]
    broken = copy.deepcopy(objects)
    spoil(broken)
    assert list(policy(broken))


# The chart

OF_A_RELEASE = {
    "namespace",
    "checksum/settings",
    "app.kubernetes.io/instance",
    "app.kubernetes.io/managed-by",
    "app.kubernetes.io/version",
    "helm.sh/chart",
}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_chart_is_what_kustomize_makes(overlay: str) -> None:
    charted, made = (
        {(one["kind"], one["metadata"]["name"]): one for one in map(_plain, rendered(by, overlay))}
        for by in ("helm", "kustomize")
    )
    made = {name: one for name, one in made.items() if name[0] != "Namespace"}  # helm's --create-namespace
    for one in (*charted.values(), *made.values()):
        one["metadata"].pop("labels", None)  # no selector looks at these
    assert charted.keys() == made.keys()
    for name, one in made.items():
        assert charted[name] == one, name


def _plain(value: Any) -> Any:
    """An object without what tells helm's from kustomize's: namespace, labels of a release, how a change of settings is noticed, and
    the order of what has names."""
    if isinstance(value, dict):
        plain = {key: _plain(one) for key, one in value.items() if key not in OF_A_RELEASE}
        if str(plain.get("name", "")).startswith("engram-settings-"):
            plain["name"] = "engram-settings"
        return plain
    if isinstance(value, list):
        return sorted(map(_plain, value), key=lambda one: str(one.get("name", "")) if isinstance(one, dict) else "")
    return value


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_helm_lint_finds_nothing(overlay: str) -> None:
    done = run("helm", "lint", "--strict", CHART, *values_of(overlay))
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    "value", ["setings.batch_rows_max=512", "settings.drain_timeout_s=soon", "settings.tls_key=x", "image.variant=tpu"]
)
def test_values_that_mean_nothing_are_refused(value: str) -> None:
    done = run("helm", "template", "engram", CHART, "--set", value)
    assert done.returncode != 0 and "values don't meet the specifications of the schema" in done.stderr


def test_two_releases_do_not_meet() -> None:
    """Names and selectors are the release's, so another Engram in the namespace is another."""
    one, two = (
        list(yaml.safe_load_all(run("helm", "template", name, CHART, *values_of("production")).stdout))
        for name in ("one", "two")
    )
    names = [{(it["kind"], it["metadata"]["name"]) for it in them} for them in (one, two)]
    assert not names[0] & names[1]
    assert list(selected(one)) == []
    assert list(selected([*of_kind(one, "Deployment"), *(it for it in two if it["kind"] != "Deployment")]))


def test_the_validation_can_fail(objects: Objects) -> None:
    broken = copy.deepcopy(of_kind(objects, "Deployment")[0])
    broken["spec"]["replica"] = 2
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, VERSIONS[0], strict=True)


def test_the_example_of_a_redis_is_one_that_sessions_are_safe_in() -> None:
    cluster, config = yaml.safe_load_all((ROOT / "redis" / "redis-cluster.yaml").read_text())
    assert cluster["spec"]["clusterSize"] == 3 and cluster["spec"]["persistenceEnabled"]
    for role in ("redisLeader", "redisFollower"):
        assert cluster["spec"][role]["redisConfig"]["additionalRedisConfig"] == config["metadata"]["name"]
    assert "maxmemory-policy noeviction" in config["data"]["redis-additional.conf"]


def test_the_autoscaler_asks_for_what_the_adapter_gives() -> None:
    (rule,) = yaml.safe_load((ROOT / "prometheus-adapter.yaml").read_text())["rules"]["custom"]
    scaler = yaml.safe_load((ROOT / "overlays" / "production" / "autoscaler.yaml").read_text())
    assert scaler["spec"]["metrics"][0]["pods"]["metric"]["name"] == rule["name"]["as"]
