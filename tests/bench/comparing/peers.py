"""Gets the programs: Strandline from this checkout, peers from packages, PyPI and crates.io, helpers from the compiler.

What is there already is taken; what cannot be had is noted with its reason and left out of the run, never silently.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from .place import Place
from .shell import Failed, find, run, say
from .tools.base import Kit

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parents[2]
# Where cargo puts what it builds here.
BUILT = CHECKOUT / os.environ.get("CARGO_TARGET_DIR", "target")
# Debian's package of each program that is no part of a minimal system.
PACKAGES = {"socat": "socat", "zstd": "zstd", "restic": "restic", "sshd": "openssh-server", "ssh": "openssh-client",
            "openssl": "openssl", "mkfs.ext4": "e2fsprogs", "cc": "gcc libc6-dev", "tar": "tar"}
# Programs from crates.io: the crate, what it needs to build, and options. What rustic leaves out is no part of a backup: a
# screen interface, metrics, a WebDAV server.
CRATES = {"rustic": ("rustic-rs", "", ["--no-default-features"]), "rustic-server": ("rustic_server", "", []),
          "bupstash": ("bupstash", "libsodium-dev pkg-config", []), "inferno-flamegraph": ("inferno", "", [])}
# Newer than Debian's, where pip can build it or has it built.
BORG = "borgbackup==1.4.*"


Step = Callable[[Kit], None]


def gather(place: Place, tools: list[str], network: bool, strand: Path | None, server: Path | None) -> Kit:
    """Everything that `tools` need."""
    kit = Kit(place)
    _compile(kit, "measure", [])
    _compile(kit, "walk", ["-pthread"])
    _own(kit, strand, server)
    wanted = {
        "tar": [_packaged("tar"), _packaged("zstd"), _packaged("socat"), _certificate],
        "restic": [_packaged("restic")] + [_rest_server, _certificate] * network,
        "rustic": [_crate("rustic")] + [_rest_server, _certificate] * network,
        "borg": [_borg] + [_packaged("ssh"), _packaged("sshd")] * network,
        "bupstash": [_crate("bupstash")] + [_packaged("ssh"), _packaged("sshd")] * network,
        "flames": [_crate("inferno-flamegraph")],
    }
    for tool in tools:
        for step in wanted.get(tool, []):
            step(kit)
    # What was left of building is larger than everything that was built.
    shutil.rmtree(place.tools / "build", ignore_errors=True)
    _versions(kit)
    return kit


def _compile(kit: Kit, name: str, options: list[str]) -> None:
    _packaged("cc")(kit)
    built = kit.place.tools / "bin" / name
    run([kit.get("cc") if "cc" in kit.programs else "cc", "-O2", "-o", built, HERE / f"{name}.c", *options])
    kit.programs[name] = built


def _own(kit: Kit, strand: Path | None, server: Path | None) -> None:
    built = BUILT / "release"
    for name, given in (("strand", strand), ("strand-server", server)):
        kit.programs[name] = (given or built / name).resolve()
    if not all(kit.get(name).is_file() for name in ("strand", "strand-server")):
        if strand or server:
            raise Failed("the programs given with --strand and --strand-server do not exist")
        say("building Strandline")
        run(["cargo", "build", "--release", "--locked"], cwd=CHECKOUT)


def _packaged(program: str) -> Step:
    def step(kit: Kit) -> None:
        if program in kit.programs or program in kit.missing:
            return
        if not find(program):
            _apt(kit, program, PACKAGES[program])
        if found := find(program):
            kit.programs[program] = found
    return step


def _apt(kit: Kit, program: str, packages: str) -> None:
    install = ["apt-get", "install", "-y", "--no-install-recommends", *packages.split()]
    if os.geteuid() != 0 or not find("apt-get"):
        kit.missing[program] = f"needs {packages}; this user cannot install it"
        return
    say(f"installing {packages}")
    quiet = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    try:
        try:
            run(install, env=quiet)
        except Failed:
            run(["apt-get", "update"], env=quiet)
            run(install, env=quiet)
    except Failed as error:
        kit.missing[program] = str(error)


def _rest_server(kit: Kit) -> None:
    """restic's own if somebody has installed it; no package brings it."""
    if found := find("rest-server"):
        kit.programs["rest-server"] = found
    else:
        _crate("rustic-server")(kit)


def _crate(program: str) -> Step:
    def step(kit: Kit) -> None:
        crate, needs, options = CRATES[program]
        installed = kit.place.tools / "bin" / program
        if not installed.is_file() and program not in kit.missing:
            if needs:
                _apt(kit, f"libraries of {program}", needs)
            say(f"building {crate}: this takes some minutes")
            build = os.environ | {"CARGO_TARGET_DIR": str(kit.place.tools / "build")}
            try:
                run(["cargo", "install", crate, "--locked", *options, "--root", kit.place.tools], env=build)
            except Failed as error:
                kit.missing[program] = f"cannot be built: {error}"
        if installed.is_file():
            kit.programs[program] = installed
    return step


def _borg(kit: Kit) -> None:
    own = kit.place.tools / "borg/bin/borg"
    if not own.is_file():
        say("installing borg from PyPI")
        try:
            run(["python3", "-m", "venv", kit.place.tools / "borg"])
            run([own.with_name("pip"), "install", "--quiet", "--only-binary", ":all:", BORG])
        except Failed as error:
            say(f"borg: {error}; taking Debian's")
    if own.is_file():
        kit.programs["borg"] = own
    else:
        PACKAGES["borg"] = "borgbackup"
        _packaged("borg")(kit)


def _certificate(kit: Kit) -> None:
    """An authority, and its certificate for 127.0.0.1. Not one that signs itself: some TLS libraries refuse that."""
    if "certificate" in kit.programs:
        return
    _packaged("openssl")(kit)
    if reason := kit.lacks("openssl"):
        kit.missing["certificate"] = reason
        return
    folder = kit.place.tools / "tls"
    if not (folder / "both.pem").exists():
        folder.mkdir(exist_ok=True)
        new = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        run(["openssl", "req", "-x509", *new, "-days", "3650", "-subj", "/CN=bench", "-keyout", "authority-key.pem",
             "-out", "authority.pem"], cwd=folder)
        run(["openssl", "req", *new, "-subj", "/CN=127.0.0.1", "-keyout", "key.pem", "-out", "request.pem"], cwd=folder)
        (folder / "extensions").write_text("subjectAltName=IP:127.0.0.1\nbasicConstraints=CA:FALSE\n")
        run(["openssl", "x509", "-req", "-in", "request.pem", "-CA", "authority.pem", "-CAkey", "authority-key.pem",
             "-CAcreateserial", "-days", "3650", "-extfile", "extensions", "-out", "certificate.pem"], cwd=folder)
        (folder / "both.pem").touch(mode=0o600)
        (folder / "both.pem").write_text((folder / "key.pem").read_text() + (folder / "certificate.pem").read_text())
    kit.programs |= {"authority": folder / "authority.pem", "certificate": folder / "certificate.pem", "key": folder / "key.pem",
                     "certificate-and-key": folder / "both.pem"}


def _versions(kit: Kit) -> None:
    """What each program says of itself, in one line."""
    options = {"strand": "--version", "strand-server": "--version", "restic": "version", "borg": "--version",
               "rustic": "--version", "rustic-server": "--version", "bupstash": "version", "rest-server": "--version",
               "ssh": "-V", "tar": "--version",
               "zstd": "--version", "socat": "-V"}
    for program, option in options.items():
        if program in kit.programs:
            try:
                done = subprocess.run([kit.get(program), option], capture_output=True, text=True, check=False)
                kit.versions[program] = _version(done.stdout + done.stderr)
            except OSError as error:
                kit.versions[program] = str(error)


def _version(said: str) -> str:
    line = next((line for line in said.splitlines() if re.search(r"\d+\.\d+", line)), said[:80])
    return line.strip(" *")[:100]
