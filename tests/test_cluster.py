"""The files of ``cluster/``: valid where they are used, and every name in them exists."""

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import typer
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from orchestration.cli.app import app
from orchestration.cli.jobs import _check as check_submission

ROOT = Path(__file__).parent.parent
CLUSTER = ROOT / "cluster"
FILES = sorted(
    path
    for path in CLUSTER.rglob("*")
    if path.is_file() and path.suffix not in (".md", ".dockerignore")
)
NAMES = [str(path.relative_to(CLUSTER)) for path in FILES]
PINNED = dict(
    line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
)


def fields(known: dict[str, Any], *required: str) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": known,
        "required": list(required),
        "additionalProperties": False,
    }


WHOLE, TEXT, YES, ANY = (
    {"type": "integer", "minimum": 0},
    {"type": "string"},
    {"type": "boolean"},
    {},
)
WORDS = {"type": "object", "additionalProperties": TEXT}
GROUP = {"template": ANY, "rayStartParams": WORDS, "resources": WORDS, "labels": WORDS}
RAY_CLUSTER = fields(
    {
        "rayVersion": TEXT,
        "authOptions": fields(
            {"mode": {"enum": ["token", "disabled"]}, "secretName": TEXT, "enableK8sTokenAuth": YES}
        ),
        "enableInTreeAutoscaling": YES,
        "autoscalerOptions": fields(
            {
                "version": {"enum": ["v1", "v2"]},
                "idleTimeoutSeconds": WHOLE,
                "upscalingMode": {"enum": ["Default", "Aggressive", "Conservative"]},
                "image": TEXT,
                "resources": ANY,
            }
        ),
        "gcsFaultToleranceOptions": ANY,
        "headGroupSpec": fields({**GROUP, "serviceType": TEXT, "headService": ANY}, "template"),
        "workerGroupSpecs": {
            "type": "array",
            "items": fields(
                {
                    **GROUP,
                    "groupName": TEXT,
                    "minReplicas": WHOLE,
                    "maxReplicas": WHOLE,
                    "replicas": WHOLE,
                    "numOfHosts": WHOLE,
                    "idleTimeoutSeconds": WHOLE,
                },
                "groupName",
                "minReplicas",
                "maxReplicas",
                "template",
            ),
        },
        "suspend": YES,
    },
    "headGroupSpec",
)
RAY_JOB = fields(
    {
        "entrypoint": TEXT,
        "rayClusterSpec": RAY_CLUSTER,
        "submissionMode": {"enum": ["K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode"]},
        "shutdownAfterJobFinishes": YES,
        "ttlSecondsAfterFinished": WHOLE,
        "activeDeadlineSeconds": WHOLE,
        "backoffLimit": WHOLE,
        "runtimeEnvYAML": TEXT,
        "metadata": WORDS,
    },
    "entrypoint",
)
"""Of KubeRay 1.6's ``ray.io/v1``: the fields that we use and their neighbours, so that a slip of
the pen is none of them."""


def documents(name: str) -> list[Any]:
    return list(yaml.safe_load_all((CLUSTER / name).read_text()))


def pods(tree: Any) -> list[dict[str, Any]]:
    """Every pod's specification in a tree."""
    if isinstance(tree, list):
        return [pod for each in tree for pod in pods(each)]
    if not isinstance(tree, dict):
        return []
    own = [tree["template"]["spec"]] if isinstance(tree.get("template"), dict) else []
    return own + [pod for each in tree.values() for pod in pods(each)]


@pytest.mark.parametrize("name", NAMES)
def test_a_file_begins_with_what_it_makes_and_how_it_goes_away(name: str) -> None:
    lines = [
        line for line in (CLUSTER / name).read_text().splitlines() if not line.startswith("#!")
    ]
    head = "\n".join(
        line
        for line in lines[: next(n for n, line in enumerate(lines) if not line.startswith("#"))]
    )
    for word in ("# Makes:", "# Up:", "# Down:", "# Forgotten:"):
        assert word in head, f"{name} does not say {word}"
    assert f"cluster/{name}" in head or f"cluster/{Path(name).parent}" in head, (
        "the command names another file"
    )


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("autoscaler/")])
def test_rays_autoscaler_takes_the_file(name: str) -> None:
    tree = documents(name)[0]
    validate_config(prepare_config(tree))
    with pytest.raises(jsonschema.ValidationError):
        validate_config(prepare_config({**documents(name)[0], "max_worker": 1}))
    if "available_node_types" in tree:
        workers = [
            node
            for kind, node in tree["available_node_types"].items()
            if kind != tree["head_node_type"]
        ]
        assert all(node["min_workers"] == 0 for node in workers), "idle workers cost nothing"
        assert "spot" in str(workers).lower()


@pytest.mark.parametrize("name", ["kuberay/raycluster.yaml", "kuberay/rayjob.yaml"])
def test_kuberays_operator_takes_the_file(name: str) -> None:
    (tree,) = documents(name)
    schema = {"RayCluster": RAY_CLUSTER, "RayJob": RAY_JOB}[tree["kind"]]
    assert (tree["apiVersion"], set(tree)) == (
        "ray.io/v1",
        {"apiVersion", "kind", "metadata", "spec"},
    )
    jsonschema.validate(tree["spec"], schema)
    cluster = tree["spec"].get("rayClusterSpec", tree["spec"])
    assert (cluster["authOptions"]["mode"], cluster["rayVersion"]) == ("token", PINNED["ray"])
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**tree["spec"], "shutdownAfterFinish": True}, schema)


@pytest.mark.parametrize(
    "name", [name for name in NAMES if name.startswith("kuberay/") or "kubernetes" in name]
)
def test_kubernetes_takes_every_pod_and_every_object(name: str) -> None:
    checked = 0
    for tree in documents(name):
        if not tree["apiVersion"].startswith("ray.io"):
            kubernetes_validate.validate(tree, "1.34", strict=True)
            checked += 1
        for pod in pods(tree):
            whole = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": pod}
            kubernetes_validate.validate(whole, "1.34", strict=True)
            mounts = {
                mount["name"]
                for each in pod["containers"]
                for mount in each.get("volumeMounts", [])
            }
            claimed = {
                each["metadata"]["name"] for each in tree["spec"].get("volumeClaimTemplates", [])
            }
            assert mounts == {volume["name"] for volume in pod.get("volumes", [])} | claimed
            checked += 1
    assert checked


def test_a_misspelt_field_of_a_pod_would_be_seen() -> None:
    pod = pods(documents("kuberay/raycluster.yaml"))[0]
    pod["containers"][0]["imagee"] = "x"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(
            {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": pod},
            "1.34",
            strict=True,
        )


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith(".sbatch")])
def test_scripts_are_sound(name: str) -> None:
    subprocess.run(["bash", "-n", CLUSTER / name], check=True)
    subprocess.run([Path(sys.executable).parent / "shellcheck", CLUSTER / name], check=True)


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith("Dockerfile")])
def test_images_are_sound_and_of_the_tested_versions(name: str) -> None:
    subprocess.run([Path(sys.executable).parent / "hadolint", CLUSTER / name], check=True)
    text = (CLUSTER / name).read_text()
    for package, version in re.findall(r"(?<![\w-])(ray|mlflow)(?:==|:)(\d[\d.]*\d)", text):
        assert version == PINNED[package]
    context = ROOT if name == "Dockerfile" else (CLUSTER / name).parent
    for line in re.findall(r"^COPY --\S+ (.*) \S+$", text, re.MULTILINE):
        assert all((context / path).exists() for path in line.split())


def test_the_server_is_for_loopback_and_its_own_pods_only() -> None:
    services = documents("mlflow/compose.yaml")[0]["services"]
    assert (
        services["mlflow"]["ports"] == ["127.0.0.1:5000:5000"]
        and "ports" not in services["database"]
    )
    assert "--allowed-hosts" in services["mlflow"]["command"]
    assert (
        "--app-name basic-auth" in services["mlflow"]["command"]
        and "SECRET" not in services["mlflow"]["command"]
    )
    assert all("no-new-privileges:true" in each["security_opt"] for each in services.values())
    objects = documents("mlflow/kubernetes.yaml")
    assert not any(each["spec"].get("type") in ("LoadBalancer", "NodePort") for each in objects)
    guarded = {
        each["spec"]["podSelector"]["matchLabels"]["app"]
        for each in objects
        if each["kind"] == "NetworkPolicy"
    }
    assert guarded == {"mlflow", "mlflow-database"}


def commands() -> list[tuple[str, str]]:
    """Every ``mar …`` that the files and their page name."""
    found: list[tuple[str, str]] = []
    for path in [*FILES, CLUSTER / "README.md"]:
        text = re.sub(r"\\\n\s*", " ", path.read_text())
        lines = re.findall(
            r"(?<![\w/.-])(mar (?:run|submit|jobs|plan|status|stop|ui)\b[^\n`|)#']*)", text
        )
        workdir = str(path.relative_to(CLUSTER))
        output = [line.split("     ")[0].split(" && ")[0].strip() for line in lines]
        found += [
            (workdir, line) for line in output if len(line.split()) > 2
        ]  # a verb alone is a mention
    return found


@pytest.mark.parametrize(("name", "line"), commands())
def test_every_command_in_the_files_is_one_that_mar_has(name: str, line: str) -> None:
    values = {
        "study": "quickstart",
        "store": "/mar/store",
        "tracking": "",
        "head": "h",
        "port": "1",
        "@": "",
    }
    values |= {"MAR_STORE:-$root/mar_store": "/mar/store", "MAR_TRACKING_URI": "http://mlflow:5000"}
    for variable, value in values.items():
        line = line.replace(f"${{{variable}}}", value).replace(f"${variable}", value)
    _, verb, *arguments = [word for word in shlex.split(line) if word]
    group = typer.main.get_command(app)
    command = group.commands[verb]
    command.make_context(verb, arguments)
    if (
        verb == "submit" and "--address" in arguments
    ):  # what mar submit looks at before it asks the cluster
        address = arguments.index("--address")
        check_submission(arguments[0], arguments[1:address] + arguments[address + 2 :])
    if verb == "run" and "--address" in arguments and arguments[0] != "quickstart":
        assert any(word.startswith("data.root=/") for word in arguments), (
            "a job's working folder is another"
        )


def test_every_study_in_the_files_is_one_that_ships() -> None:
    studies = {path.stem for path in (ROOT / "search_spaces").glob("*.yaml")}
    named = {
        line.split()[2]
        for _, line in commands()
        if line.split()[1] in ("run", "submit") and len(line.split()) > 2
    }
    assert {name for name in named if re.fullmatch(r"[a-z]+\w+", name)} <= studies


@pytest.mark.parametrize(
    "name", [name for name in NAMES if name.startswith("kuberay/") or "kubernetes" in name]
)
def test_no_pod_runs_as_root_or_may_become_it_and_no_secret_is_an_argument(name: str) -> None:
    for tree in documents(name):
        for pod in pods(tree):
            assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"]
            assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
            for each in pod["containers"]:
                assert each["securityContext"] == {
                    "allowPrivilegeEscalation": False,
                    "capabilities": {"drop": ["ALL"]},
                }
                assert "$(PASSWORD)" not in str(each.get("args"))
                secrets = [
                    entry
                    for entry in each["env"]
                    if "PASSWORD" in entry["name"] or "SECRET" in entry["name"]
                ]
                assert secrets and all("secretKeyRef" in entry["valueFrom"] for entry in secrets)


def test_rays_ports_are_for_its_own_pods() -> None:
    (policy,) = documents("kuberay/network.yaml")
    assert policy["spec"]["podSelector"]["matchLabels"] == {"ray.io/is-ray-node": "yes"}
    own, others = policy["spec"]["ingress"]
    assert own == {"from": [{"podSelector": policy["spec"]["podSelector"]}]}
    assert others["ports"] == [{"port": 8265}]
    job = documents("kuberay/rayjob.yaml")[0]["metadata"]["name"]
    assert {"podSelector": {"matchLabels": {"batch.kubernetes.io/job-name": job}}} in others["from"]


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("autoscaler/")])
def test_what_the_autoscaler_mounts_has_no_keys(name: str) -> None:
    (tree,) = documents(name)
    assert {".env*", "*.pem", "*.key", "id_*"} <= {*tree["rsync_exclude"]}
    assert "umask 077; ray get-auth-token" in (CLUSTER / name).read_text()
