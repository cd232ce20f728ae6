"""python -m tests.release

Build the wheel and the sdist, and check that what a user installs is what the repository has: run by `make
release-check` and, before it publishes, by the release workflow.

The wheel is installed into a fresh environment without constraints, hence with the newest releases that its ranges
admit; only the build of torch is chosen first. Everything is tried from another folder with an interpreter that does
not see the checkout, and the main job of `make demo` is run there. The sdist has to give the same wheel.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import textwrap
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VERSION = re.compile(r"__version__ = \"([^\"]+)\"")
COMMAND = "hf_erasure_command.py"  # It stands beside the package, since it starts before the package is imported.
# Files that a user needs, whether or not git lists them.
PACKAGED = (
    COMMAND, "hf_erasure/py.typed", "hf_erasure/evaluation/templates/report.html.j2", "hf_erasure/metrics/weat.py",
)  # fmt: skip
SHIPPED = ("README.md", "LICENSE", "pyproject.toml", "CHANGELOG.md", "tests/conftest.py", "docs/index.md", "mkdocs.yml")

MAIN_JOB = "recipes/minilm-gender/recipe.yaml"

VERSIONS = """
from importlib.metadata import version
names = ("torch", "transformers", "peft", "accelerate", "datasets", "huggingface_hub")
print("with " + ", ".join(f"{name} {version(name)}" for name in names))
"""

# The fresh interpreter runs this in an empty folder.
INSTALLED = """
import importlib, pathlib, pkgutil, sys
from importlib.metadata import version
from importlib.resources import files

import hf_erasure
where = pathlib.Path(hf_erasure.__file__).resolve()
assert pathlib.Path(sys.prefix).resolve() in where.parents, f"imported from {where}, not from the environment"
assert version("hf-erasure") == hf_erasure.__version__ == EXPECTED, (version("hf-erasure"), hf_erasure.__version__)

from peft import PeftType
assert {"CONCEPT_ERASURE", "GRADIEND"} <= {member.value for member in PeftType}

for name in hf_erasure.__all__:
    getattr(hf_erasure, name)
found = [module.name for module in pkgutil.walk_packages(hf_erasure.__path__, "hf_erasure.")]
for name in found:
    if not name.endswith("__main__"):
        importlib.import_module(name)

import evaluate
from hf_erasure.metrics import METRICS, metric_path
for name in METRICS:
    evaluate.load(metric_path(name))

from hf_erasure.hub.rendering import environment
for name in CARDS:
    template = pathlib.Path(environment().get_template(name).filename).resolve()
    assert where.parent in template.parents, template

root = files("hf_erasure")
for name in DATA:
    assert root.joinpath(name).is_file(), f"{name} is not in the wheel"
print(f"{len(found)} modules, {len(METRICS)} metrics, {len(CARDS)} templates of cards, {len(DATA)} other files")
"""


class Unfit(Exception):
    """The distribution is not fit to be released."""


def run(command: Sequence[str | Path], *, cwd: Path, isolated: bool = False) -> str:
    """Run a command, and return what it prints.

    Raises:
        Unfit: If it fails.
    """
    environment = {key: value for key, value in os.environ.items() if not (isolated and key.startswith("PYTHON"))}
    environment |= {"HF_HUB_OFFLINE": "1"} if isolated else {}
    done = subprocess.run([str(word) for word in command], cwd=cwd, capture_output=True, text=True, env=environment)
    if done.returncode:
        shown = " ".join(map(str, command[:4]))
        raise Unfit(f"`{shown} …` ended with {done.returncode}:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
    return done.stdout


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def build(source: Path, output: Path, *kinds: str) -> list[Path]:
    """Build distributions of a source tree, each in an environment of its own."""
    run([sys.executable, "-m", "build", *kinds, "--outdir", output, source], cwd=ROOT)
    return sorted(output.iterdir())


def data_files() -> list[str]:
    """Everything in the package that is not a module, as paths below it."""
    tracked = run(["git", "ls-files", "hf_erasure"], cwd=ROOT).split() if (ROOT / ".git").exists() else []
    named = tracked or [str(path.relative_to(ROOT)) for path in (ROOT / "hf_erasure").rglob("*") if path.is_file()]
    kept = [name for name in named if not name.endswith((".py", ".pyc")) and "__pycache__" not in name]
    return sorted({name.removeprefix("hf_erasure/") for name in [*kept, *PACKAGED] if not name.endswith(".py")})


def cards() -> list[str]:
    """The templates of model cards, which are beside the package in the repository and inside it in the wheel."""
    return sorted(path.name for path in (ROOT / "model_cards").glob("*.j2"))


def digests(wheel: Path) -> dict[str, str]:
    """File in the wheel → digest; without the wheel's own list of files, which repeats the other digests."""
    with zipfile.ZipFile(wheel) as archive:
        return {
            name: hashlib.sha256(archive.read(name)).hexdigest()
            for name in archive.namelist()
            if not name.endswith(".dist-info/RECORD")
        }


def check_contents(wheel: Path, sdist: Path, version: str, tag: str) -> None:
    """Check the names, the version and the lists of files.

    Raises:
        Unfit: If a file is missing or foreign, or the version differs from the tag or is not in the changelog.
    """
    if f"-{version}-" not in wheel.name or f"-{version}.tar" not in sdist.name:
        raise Unfit(f"{wheel.name} and {sdist.name} are not of version {version}")
    if tag and tag != f"v{version}":
        raise Unfit(f"the tag {tag} is not v{version}, which hf_erasure/_version.py says")
    if tag and not re.search(rf"^## {re.escape(version)} \(\d{{4}}-\d\d-\d\d\)$", _text("CHANGELOG.md"), re.MULTILINE):
        raise Unfit(f"CHANGELOG.md has no `## {version} (year-month-day)`: a release has a date")
    inside = set(digests(wheel))
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "hf_erasure").rglob("*.py")}
    wanted = modules | set(PACKAGED) | {f"hf_erasure/{name}" for name in data_files()}
    if missing := sorted((wanted | {f"hf_erasure/model_cards/{name}" for name in cards()}) - inside):
        raise Unfit(f"not in the wheel: {missing}")
    if foreign := sorted(name for name in inside if not name.startswith(("hf_erasure/", "hf_erasure-", COMMAND))):
        raise Unfit(f"in the wheel, and of no package of ours: {foreign}")
    with tarfile.open(sdist) as archive:
        shipped = {name.partition("/")[2] for name in archive.getnames()}
    if missing := sorted({*SHIPPED, *wanted} - shipped):
        raise Unfit(f"not in the sdist: {missing}")


def _text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def check_sdist(wheel: Path, sdist: Path, folder: Path) -> None:
    """Check that a wheel built from the unpacked sdist has the same files, to the byte.

    Raises:
        Unfit: If a file differs.
    """
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (source,) = folder.iterdir()
    (again,) = build(source, folder / "again", "--wheel")
    one, other = digests(wheel), digests(again)
    if one != other:
        differing = sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
        raise Unfit(f"the wheel of the sdist differs in {differing}")


def check_installed(wheel: Path, folder: Path, version: str, borrowed: str | None) -> None:
    """Install the wheel into a fresh environment, and use it there.

    Args:
        wheel: The wheel.
        folder: The folder in which the environment is made.
        version: The version that the package must have.
        borrowed: Site packages that have the dependencies; saves the time of their installation.
    """
    venv.create(folder / "environment", with_pip=True)
    binaries = folder / "environment" / ("Scripts" if os.name == "nt" else "bin")
    python, empty = binaries / "python", folder / "empty"
    empty.mkdir()
    if borrowed:
        asked = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
        Path(run(asked, cwd=empty, isolated=True).strip(), "borrowed.pth").write_text(f"{borrowed}\n", encoding="utf-8")
    pip: list[str | Path] = [python, "-m", "pip", "install", "--quiet"]
    if borrowed:
        run([*pip, "--no-deps", "--force-reinstall", wheel], cwd=empty, isolated=True)
    else:
        run([*pip, torch_pin()], cwd=empty, isolated=True)
        run([*pip, f"{wheel}[demo]"], cwd=empty, isolated=True)
        run([python, "-m", "pip", "check"], cwd=empty, isolated=True)
    say(run([python, "-c", VERSIONS], cwd=empty, isolated=True).strip())
    script = f"EXPECTED, DATA, CARDS = {version!r}, {data_files()!r}, {cards()!r}\n{textwrap.dedent(INSTALLED)}"
    say(run([python, "-I", "-W", "ignore", "-c", script], cwd=empty, isolated=True).strip().splitlines()[-1])
    for command in (["--help"], ["fit", "--help"], ["gradiend", "fit", "--help"], ["evaluate", "--help"]):
        if "Usage" not in run([binaries / "hf-erasure", *command], cwd=empty, isolated=True):
            raise Unfit(f"`hf-erasure {' '.join(command)}` does not say how it is used")
    check_main_job(binaries / "hf-erasure", empty)


def torch_pin() -> str:
    """The pin of torch in constraints.txt. It is installed first, since the index may have another build of the newest.

    Raises:
        Unfit: If the file does not pin torch.
    """
    found = re.search(r"^torch==[^\s;]+", _text("constraints.txt"), re.MULTILINE)
    if found is None:
        raise Unfit("constraints.txt has no line `torch==…`")
    return found[0]


def check_main_job(program: Path, folder: Path) -> None:
    """Do what `make demo` does first: erase a concept from the embedded model, load the adapter again, compare.

    Raises:
        Unfit: If a command fails, or an adapter is not saved.
    """
    run([program, "fit", ROOT / MAIN_JOB, "output=adapter"], cwd=folder, isolated=True)
    if not (folder / "adapter" / "adapter_model.safetensors").is_file():
        raise Unfit(f"`hf-erasure fit {MAIN_JOB}` saved no adapter")
    say(run([program, "check", "adapter"], cwd=folder, isolated=True).strip().splitlines()[-1])


def main() -> None:
    """Build, check, and leave both distributions in `dist`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[2])
    parser.add_argument("--tag", default="", help="the tag to release, such as v0.1.0")
    parser.add_argument("--borrow", help="take dependencies from these site packages, and install the wheel alone")
    options = parser.parse_args()
    found = VERSION.search(_text("hf_erasure/_version.py"))
    if found is None:
        sys.exit("hf_erasure/_version.py has no __version__")
    dist = ROOT / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    try:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            sdist, wheel = sorted(build(ROOT, dist, "--sdist", "--wheel"), key=lambda path: path.suffix != ".gz")
            check_contents(wheel, sdist, found[1], options.tag)
            say(f"contents: {len(digests(wheel))} files in {wheel.name}")
            (folder / "source").mkdir()
            check_sdist(wheel, sdist, folder / "source")
            say(f"{sdist.name} builds the same wheel")
            check_installed(wheel, folder, found[1], options.borrow)
    except Unfit as error:
        sys.exit(f"release check: {error}")
    say(f"dist/{sdist.name} and dist/{wheel.name} are fit to be released")


if __name__ == "__main__":
    main()
