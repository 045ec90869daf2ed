# %% [markdown]
# # A hidden classifier, a defence learnt from its answers, and other people's attacks, all on the embedded digits
#
# A script in cells: VS Code, PyCharm and Jupyter (with jupytext) run it cell by cell, and `python docs/walkthrough.py`
# as a whole, in about a minute. It needs `pip install -e '.[server,client,onnxruntime,art]'`. The API is in library.md.

# %% [markdown]
# ## An oracle
#
# A program of its own, with a ledger of its own. Its operator adds a client with a budget of so many queries (rows
# through the classifier); what the client gets is an address and a key.

# %%
import atexit
import contextlib
import subprocess
import sys
import tempfile
from pathlib import Path

folder = Path(tempfile.mkdtemp(prefix="walkthrough-"))
running = contextlib.ExitStack()  # of the servers below; closed at the end, and in any case when Python ends
atexit.register(running.close)


def start_oracle(name: str, budget: int, *options: str) -> tuple[subprocess.Popen[str], str]:
    """Serve from another process until `running` is closed; the process, and the key of a client with a budget."""
    command, ledger = [sys.executable, "-m", "oracle_server"], ["--ledger", str(folder / f"{name}.db")]
    adding = [*command, "clients", "add", "reader", "--budget", str(budget), *ledger]
    key = subprocess.run(adding, check=True, capture_output=True, text=True).stdout.strip()
    # The engine is named, so that there are no others to compare it with at the start.
    serving = [*command, "serve", "--port", "0", "--engine", "eager", *ledger, *options]
    process = running.enter_context(subprocess.Popen(serving, stdout=subprocess.PIPE, text=True))
    running.callback(process.terminate)
    return process, key


def address(process: subprocess.Popen[str]) -> str:
    """Where it listens, as soon as it does."""
    assert process.stdout is not None
    return process.stdout.readline().removeprefix("listening on ").strip()


hidden, key = start_oracle("hidden", 100_000)

# %% [markdown]
# While it starts, the library.

# %%
from shared import process

process.prepare()  # before torch is loaded: oracle and defender share this machine, and whoever waits is to sleep

import numpy as np
import torch

from defender_client import (
    ABSTAIN,
    BudgetExhausted,
    Counted,
    Defended,
    LiveOracle,
    OracleModule,
    RemoteOracle,
    art_classifier,
    export_stack,
    load_preset,
    load_stack,
    make_estimator,
    predicted,
    train_job,
)
from defender_client.data import load_test

torch.manual_seed(0)
np.random.seed(0)  # ART draws from it
url = address(hidden)
oracle = running.enter_context(RemoteOracle(url, key))
print(oracle.info)

# %% [markdown]
# It is a callable from images to logits, of torch or of numpy. Every row is charged.

# %%
test = load_test(load_preset("demo").data, None)
images, labels = test.floats(slice(0, 100)), torch.as_tensor(test.labels[:100])
accuracy = float((oracle(images).argmax(1) == labels).float().mean())
print(f"accuracy {accuracy:.2f}; {oracle.cost} queries, {oracle.remaining} left")
assert oracle.cost == 100

# %% [markdown]
# ## A defence, learnt from answers
#
# A denoiser and an encoder in front of a decoder, trained by zeroth-order gradients (ZO-AE-DS with CGE). These settings
# are for haste: `load_preset("demo")` is the one to learn something with.

# %%
settings = [
    'data.dataset="digits"',
    "data.train_images=0",
    "autoencoder.width=16",
    "pretrain.autoencoder_epochs=30",
    "pretrain.batch=64",
    "train.steps=40",
    "train.batch=16",
]
config = load_preset("zo-ae-ds-cge", settings, scale="smoke")
run = folder / "run"
trained = train_job(config, run, None, LiveOracle(url, key), lambda plan: print(f"to spend: {plan.to_train:,} queries"))
print(f"trained with {trained.spent:,} queries")

# %% [markdown]
# ## The smoothed classifier
#
# `Defended` puts the stack in front of an oracle, any oracle, and is one itself. Smoothed, it predicts or abstains, and
# certifies a radius within which no image is answered otherwise.

# %%
defended = Defended(load_stack(trained.stack), oracle)
smooth = defended.smooth()
for x, label in zip(images[:4], labels, strict=False):
    certificate = smooth.certify(x, n0=20, n=200, alpha=0.01)
    said = "abstained" if certificate.label == ABSTAIN else f"{certificate.label} within {certificate.radius:.2f}"
    print(f"digit {label}: {said}, {certificate.queries} queries")

# %% [markdown]
# ## Somebody else's attack
#
# ART's HopSkipJump, as it is, over the wire. `Counted` says what it cost, which is what the ledger says.
# (`foolbox_model` does the same for Foolbox, `OracleModule` for whatever takes a torch module, AutoAttack for one.)

# %%
from art.attacks.evasion import HopSkipJump

asked = Counted(oracle)
before = oracle.budget().spent
attack = HopSkipJump(art_classifier(asked), norm=2, max_iter=5, max_eval=100, init_eval=10, verbose=False)
adversarial = torch.from_numpy(attack.generate(images[:4].numpy()))
print(f"{asked.queries:,} queries; l2 norms {(adversarial - images[:4]).flatten(1).norm(dim=1).numpy().round(2)}")
assert asked.queries == oracle.budget().spent - before

# %% [markdown]
# Gradients the oracle has none. They may be estimated, at so many queries an image.

# %%
model = OracleModule(oracle, make_estimator("rge", q=50, generator=torch.Generator().manual_seed(0)))
x = images[:2].clone().requires_grad_()
torch.nn.functional.cross_entropy(model(x), labels[:2]).backward()
print(f"|gradient| {x.grad.flatten(1).norm(dim=1).numpy().round(3)}, {model.queries} queries")
assert model.queries == 2 + 2 * 51

# %% [markdown]
# ## For other programs
#
# The stack as data, as a torch program, as ONNX, and a manifest with digests.

# %%
import onnxruntime

manifest = export_stack(run, folder / "stack")
print(manifest.model_dump_json(indent=2))
session = onnxruntime.InferenceSession(folder / "stack" / "stack.onnx")
cleaned = session.run(None, {"images": images.numpy()})[0]
with torch.no_grad():
    difference = np.abs(cleaned - load_stack(trained.stack)(images).numpy()).max()
print(f"ONNX Runtime and torch differ by {difference:.1e}")
assert difference < 1e-5

# %% [markdown]
# ## A robust classifier, served
#
# The operator puts the stack in front of the classifier and smooths it: whoever asks is answered with the label that
# 100 noisy copies vote for, or with a row of zeros where the vote may be luck. A row is one query, however many copies.

# %%
smoothing = ("--smooth", "100", "--smooth-alpha", "0.001")
serving, robust_key = start_oracle("robust", 1000, "--defence", str(folder / "stack"), *smoothing)
robust = running.enter_context(RemoteOracle(address(serving), robust_key))
told = predicted(robust(torch.cat([images[:4], adversarial])))
print(f"digits {labels[:4].tolist()}: {told[:4].tolist()}; attacked: {told[4:].tolist()} ({ABSTAIN} is an abstention)")
assert robust.info.abstains
assert robust.budget().spent == 8
assert torch.equal(told, predicted(robust(torch.cat([images[:4], adversarial])))), "the same image, the same answer"

# %% [markdown]
# Its budget ends where it ends: what it does not cover is refused whole, and not charged.

# %%
try:
    robust(torch.rand(1000, 1, 8, 8))
except BudgetExhausted as refusal:
    print(f"refused: {refusal.detail}")
assert robust.budget().remaining == 984

# %%
running.close()
