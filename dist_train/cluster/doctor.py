"""`dist-train doctor`: says before a run what would fail in it, a line for each finding."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import torch

from dist_train.cluster.hosts import read_hostfile
from dist_train.cluster.probe import existing_folder
from dist_train.config import Recipe
from dist_train.data.manifest import Manifest, read_manifest
from dist_train.data.plan import micro_batch_of, rank_batch
from dist_train.data.remote import is_url
from dist_train.errors import UseError, WorkError
from dist_train.image_folder import is_image_source, sets_folder
from dist_train.models.build import build_model
from dist_train.output import say
from dist_train.recipe import problems
from dist_train.train.settings import precision_of

_SSH = ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-o", "ServerAliveInterval=15"]
_PROBE_S = 120  # seconds for a host to import torch from a cold disk
_SKEW_S = 5.0
GB = 10**9


@dataclass(frozen=True)
class Finding:
    """level: ok, warn or fail. what: the host or setting that it is about. cure: what to do, where it is not ok."""

    level: str
    what: str
    finding: str
    cure: str = ""

    def __str__(self) -> str:
        return f"{self.level:4} {self.what}: {self.finding}" + (f"; {self.cure}" if self.cure else "")


def examine(recipe: Recipe, resume: str, hostfile: Path | None) -> int:
    """Print the findings on a recipe and its hosts. resume: as for `train`. hostfile: None for this machine alone.

    Returns 1 if a run would fail, else 0. Raises UseError for what is not a hostfile.
    """
    slots = read_hostfile(hostfile) if hostfile else {}
    folder = existing_folder(Path(recipe.train.run))
    findings: list[Finding] = []
    try:
        with NamedTemporaryFile(prefix=".dist-train-doctor-", dir=folder) as marker:
            asked_of = recipe.data.shards, recipe.train.run, marker.name
            answers = ask(slots, [sys.executable, "-m", "dist_train.cluster.probe", *asked_of], findings)
    except OSError as error:
        text = f"{folder} cannot be written ({error.strerror})"
        findings.append(Finding("fail", "train.run", text, "choose another"))
        answers = {}
    for host, answer in answers.items():
        findings += host_findings(host, answer, recipe)
    findings += differences(answers)
    ranks = sum(slots.values()) or max([len(answer["devices"]) for answer in answers.values()] or [1]) or 1
    device = "cuda" if any(answer["devices"] for answer in answers.values()) else "cpu"
    refused = [str(problem) for problem in problems(recipe, ranks, device, _manifest_at_url(recipe), resume)]
    said = {finding.finding for finding in findings}  # of the shard set, by this host
    findings += [Finding("fail", "recipe", problem) for problem in refused if problem not in said]
    if is_image_source(recipe.data.shards):
        text = f"{recipe.data.shards} holds images: training first builds a shard set of them, or uses the one that it "
        findings.append(Finding("ok", "data.shards", f"{text}has built, in {sets_folder(recipe.data)}"))
    if not refused:
        findings.append(batch_finding(recipe, ranks))
        try:
            findings += memory_findings(recipe, ranks, answers, slots)
        except UseError as refusal:  # of a model that turns out to be none when it is built, such as model.lora's
            findings.append(Finding("fail", "recipe", str(refusal)))
    say(*findings)
    return int(any(finding.level == "fail" for finding in findings))


def ask(slots: dict[str, int], words: list[str], findings: list[Finding]) -> dict[str, dict[str, Any]]:
    """Each host's answer to the probe, or this machine's; hosts without one go into `findings`.

    Each answer's `skew` is its clock less this machine's, seconds, at most half the time of the exchange off.
    """
    remote = f"cd {shlex.quote(os.getcwd())} && exec {shlex.join(words)}"
    commands = {host: [*_SSH, "--", host, remote] for host in slots} or {"this machine": words}

    def run(command: list[str]) -> tuple[dict[str, Any] | None, str]:
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_PROBE_S, stdin=subprocess.DEVNULL)
        except (OSError, subprocess.TimeoutExpired) as error:
            return None, str(error) if isinstance(error, OSError) else f"no answer within {_PROBE_S} s"
        end = time.time()
        try:
            answer = json.loads(done.stdout.splitlines()[-1])
            return answer | {"skew": answer["time"] - end}, ""
        except (ValueError, IndexError, KeyError, TypeError):
            return None, next(reversed(done.stderr.strip().splitlines()), f"exit status {done.returncode}")

    with ThreadPoolExecutor(32) as pool:
        replies = dict(zip(commands, pool.map(run, commands.values()), strict=True))
    for host, (answer, why) in replies.items():
        if answer is None:
            cure = (
                f"make `ssh {host} true` work without a password, with this folder and environment there at this path"
            )
            findings.append(Finding("fail", host, why, cure if slots else "repair the environment"))
    return {host: answer for host, (answer, _) in replies.items() if answer is not None}


def host_findings(host: str, answer: dict[str, Any], recipe: Recipe) -> list[Finding]:
    """What one host's answer says by itself."""
    devices = [f"{device['free'] / GB:.1f} of {device['total'] / GB:.1f} GB free" for device in answer["devices"]]
    what = f"{len(devices)} GPUs ({devices[0]})" if devices else f"no GPU, {answer['cores']} cores"
    interfaces = ", ".join(f"{name} {' '.join(addresses)}" for name, addresses in answer["interfaces"].items())
    findings = [
        Finding("ok", host, f"{what}, {answer['memory_free'] / GB:.1f} GB of memory free; {interfaces or 'no network'}")
    ]
    missing = [name for name, version in answer["packages"].items() if version is None]
    if missing:
        findings.append(Finding("fail", host, f"not installed: {', '.join(missing)}", "run `pip install -e .` there"))
    if answer["digest"].startswith("error: "):
        findings.append(Finding("fail", f"{host}, data.shards", answer["digest"].removeprefix("error: ")))
    if not answer["shared"] or not answer["writable"]:
        text = "is not the same folder there" if not answer["shared"] else "cannot be written there"
        findings.append(Finding("fail", f"{host}, train.run", text, "put it on a file system that all hosts share"))
    if abs(answer["skew"]) > _SKEW_S:
        text = f"clock is {answer['skew']:+.0f} s off"
        findings.append(Finding("warn", host, text, "synchronise it (NTP): logs and signed downloads depend on it"))
    return findings


def differences(answers: dict[str, dict[str, Any]]) -> list[Finding]:
    """In what the hosts differ that must be the same: judged by what most of them have."""
    findings = []

    def compare(what: str, said: list[Any], cure: str) -> None:
        common = Counter(said).most_common(1)[0][0]
        for host, own in zip(answers, said, strict=True):
            if own != common:
                findings.append(Finding("fail", host, f"{what} is {own}, elsewhere {common}", cure))

    if len(answers) > 1:
        everyone, environment = list(answers.values()), "use the same environment on all hosts"
        compare("Python", [answer["python"] for answer in everyone], environment)
        for name in everyone[0]["packages"]:
            compare(name, [answer["packages"][name] for answer in everyone], environment)
        code = [answer["code"][:12] for answer in everyone]
        compare("the project's code", code, "check out the same commit on all hosts")
        compare("the shard set", [answer["digest"] for answer in everyone], "copy the same set to all hosts")
        if not set.intersection(*(set(answer["interfaces"]) for answer in answers.values())):
            names = {host: list(answer["interfaces"]) for host, answer in answers.items()}
            cure = "name each host's own in its environment, GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
            findings.append(Finding("fail", "network", f"no interface has the same name on all hosts: {names}", cure))
        if not findings:
            text = f"{len(answers)} with the same Python, packages, code and shard set"
            findings.append(Finding("ok", "hosts", text))
    return findings


def _manifest_at_url(recipe: Recipe) -> Manifest | None:
    try:
        return read_manifest(recipe.data.shards) if is_url(recipe.data.shards) else None
    except (UseError, WorkError):  # as the hosts say
        return None


def batch_finding(recipe: Recipe, ranks: int) -> Finding:
    """How the global batch is divided over the ranks, and a rank's share into micro-batches."""
    batch = recipe.train.batch_size
    if recipe.train.micro_batch_size == "auto":
        text = f"{batch} = {ranks} ranks x {rank_batch(batch, ranks)}, in micro-batches that the run finds"
        return Finding("ok", "train.batch_size", text)
    micro = micro_batch_of(batch, ranks, recipe.train.micro_batch_size)
    return Finding("ok", "train.batch_size", f"{batch} = {ranks} ranks x {batch // ranks // micro} x {micro}")


def memory_findings(
    recipe: Recipe, ranks: int, answers: dict[str, dict[str, Any]], slots: dict[str, int]
) -> list[Finding]:
    """Whether weights, gradients and optimizer states fit beside each other, and the checkpoints onto the disk."""
    with torch.device("meta"):
        model, _ = build_model(replace(recipe.model, weights="none"), recipe.data.image_size, 1000, 32_000)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    findings = []
    for host, answer in answers.items():
        need, _ = state_bytes(recipe, parameters, trained, ranks, on_gpu=bool(answer["devices"]))
        here = slots.get(host, max(1, len(answer["devices"])))
        if answer["devices"] and here > len(answer["devices"]):
            text = f"{here} slots, but {len(answer['devices'])} GPUs"
            findings.append(Finding("fail", host, text, "lower slots in the hostfile"))
        free = min((device["free"] for device in answer["devices"]), default=answer["memory_free"] / here)
        text = (
            f"{need / GB:.1f} of a rank's {free / GB:.1f} GB for weights, gradients and optimizer, before activations"
        )
        level = "fail" if need > free else "warn" if need > 0.7 * free else "ok"
        cure = "" if level == "ok" else "raise deepspeed.zero_stage, or take a smaller model"
        findings.append(Finding(level, f"{host}, memory", text, cure))
    _, checkpoint = state_bytes(recipe, parameters, trained, ranks)
    kept = (recipe.train.keep_checkpoints + 2) * checkpoint  # the best, and the one that is being written
    for host, answer in list(answers.items())[:1]:
        text = f"{answer['disk_free'] / GB:.1f} GB free where {kept / GB:.1f} GB of checkpoints go"
        full = answer["disk_free"] < kept
        cure = "free some, or lower train.keep_checkpoints" if full else ""
        findings.append(Finding("fail" if full else "ok", f"{host}, train.run", text, cure))
    return findings


def state_bytes(recipe: Recipe, parameters: int, trained: int, ranks: int, on_gpu: bool = False) -> tuple[float, float]:
    """Bytes that a rank holds for the model's states, and bytes of one checkpoint, for a number of parameters of which
    some are trained: the others have neither gradients nor optimizer states. on_gpu: without what deepspeed.offload
    keeps in main memory.

    As counted in ZeRO (Rajbhandari et al. 2020, section 3.1): stage 1 shards the optimizer's states, 2 also the
    gradients, 3 also the weights. Its optimizer steps float32 copies of the weights, whatever type these have.
    """
    stage, precision = recipe.deepspeed.zero_stage, precision_of(recipe.deepspeed)
    half = precision == "fp16" or (precision == "bf16" and stage > 0)
    weights, gradients = (2, 2) if half else (4, 4)
    states = 8 if recipe.optim.name == "adamw" else 4 if recipe.optim.momentum else 0
    masters, averages = 4 if half or stage > 0 else 0, 4 if recipe.train.ema else 0
    here = states + masters
    if on_gpu and recipe.deepspeed.offload != "none":
        here = 0
        weights = 0 if recipe.deepspeed.offload == "parameters" else weights
    of_all = weights / (ranks if stage >= 3 else 1) + averages
    of_trained = gradients / (ranks if stage >= 2 else 1) + here / (ranks if stage >= 1 else 1)
    checkpoint = parameters * (4 + averages) + trained * states  # in float32
    return parameters * of_all + trained * of_trained, checkpoint
