"""A real Slurm on this machine: two nodes and accounting, in one folder and on free ports of the loopback device.

    with Cluster(folder) as slurm:
        job = slurm.submit("script.sbatch")
        assert slurm.wait(job) == "COMPLETED"

`python tests/slurm/cluster.py FOLDER` runs a cluster by hand until it is interrupted.

The daemons are children of a supervisor, which adopts their orphans, jobs included, and ends all of them when its standard input
closes, also when the process that started the cluster is killed. Needs the Debian packages in PACKAGES, but neither systemd nor
root. Without root, jobs run as the same user, and container mounts fail.
"""

from __future__ import annotations

import ctypes
import getpass
import os
import random
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

PACKAGES = "slurm-wlm munge slurmdbd mariadb-server libslurm-dev gcc libc6-dev"
PROGRAMS = ("munged", "slurmctld", "slurmd", "slurmdbd", "mariadbd", "mariadb-install-db", "sbatch", "gcc")
SPANK_HEADER = Path("/usr/include/slurm/spank.h")
NODES = ("node1", "node2")
CPUS, GPUS = 16, 8  # declared for each node; the GPUs are plain files that Slurm counts and nobody opens
SOCKET_NAME = 107  # longest path of a Unix socket, bytes
STARTED = 120.0  # seconds to wait for all daemons on a busy machine
FINAL = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL"}
# Variables of an outer Slurm, or of the tests' process group, that jobs must not see.
FOREIGN = ("SLURM_", "SBATCH_", "SRUN_", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")

SLURM_CONF = """
ClusterName=onebox
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# A requeued job waits until its old credential has expired.
AuthInfo=socket={folder}/munge.sock,cred_expire=10
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
PlugStackConfig={folder}/plugstack.conf
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
# No cgroups, and the hardware is taken as written: runs in any container.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SwitchType=switch/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1,defer_batch
# Jobs of partition urgent take the nodes from those of partition batch, which are queued again.
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
OverTimeLimit=0
KillWait=5
ReturnToService=2
MessageTimeout=60
SlurmctldTimeout=300
SlurmdTimeout=300
InactiveLimit=0
MinJobAge=3600
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={accounting}
# Clients of slurmdbd do not look at AuthInfo.
AccountingStoragePass={folder}/munge.sock
GresTypes=gpu
{nodes}
PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} RealMemory={memory} Gres=gpu:{gpus}\n"
GRES_CONF = "NodeName={names} AutoDetect=off Name=gpu File={folder}/gpu[0-{last}]\n"
SLURMDBD_CONF = """
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={accounting}
SlurmUser={user}
PidFile={folder}/slurmdbd.pid
LogFile={folder}/log/slurmdbd.log
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={database}
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_acct_db
"""
# An init file of MariaDB: one statement a line.
DATABASE = """
CREATE DATABASE slurm_acct_db;
CREATE USER slurm@'%' IDENTIFIED BY 'slurm';
GRANT ALL ON slurm_acct_db.* TO slurm@'%';
CREATE USER slurm@localhost IDENTIFIED BY 'slurm';
GRANT ALL ON slurm_acct_db.* TO slurm@localhost;
"""


def missing() -> str | None:
    """One line that names what to install to run a cluster; None if nothing is missing."""
    lacking = [name for name in PROGRAMS if not shutil.which(name, path=_search_path())]
    if not SPANK_HEADER.exists():
        lacking.append(str(SPANK_HEADER))
    if not lacking:
        return None
    return f"not installed: {', '.join(lacking)}: apt-get install -y --no-install-recommends {PACKAGES}"


class Cluster:
    """Context in which a cluster runs. Raises RuntimeError when it does not come up."""

    def __init__(self, folder: Path, spank: bool = True) -> None:
        """Set a cluster up, without starting it.

        Args:
            folder: new directory for all of its files, logs too.
            spank: True lets srun take pyxis' options (pyxis_standin.c).
        """
        self.folder, self.spank = folder.resolve(), spank

    def __enter__(self) -> Cluster:
        command = [sys.executable, str(Path(__file__).resolve()), str(self.folder), *([] if self.spank else ["--no-spank"])]
        # A session of its own: Ctrl-C reaches pytest only, which then ends the cluster.
        self._supervisor = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True, env=self.environment
        )
        assert self._supervisor.stdout
        try:
            line = self._supervisor.stdout.readline()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        if line != "ready\n":
            self.__exit__(None, None, None)
            raise RuntimeError(line.strip() or f"the cluster did not come up; see {self.folder}/log")
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        assert self._supervisor.stdin
        self._supervisor.stdin.close()
        self._supervisor.wait()

    @property
    def environment(self) -> dict[str, str]:
        """Environment for commands of this cluster: this process's, without variables of an outer Slurm."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
        return {**kept, "PATH": _search_path(), "SLURM_CONF": str(self.folder / "slurm.conf")}

    def run(self, *command: str | Path, check: bool = True, timeout: float = 60, **variables: str) -> str:
        """Run a command of this cluster and return its standard output. Raises RuntimeError if it fails, unless `check` is false.

        Args:
            command: words of the command.
            check: false if it may fail.
            timeout: seconds.
            variables: added to its environment.
        """
        done = subprocess.run(
            [str(word) for word in command],
            env={**self.environment, **variables},
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(map(str, command))} ended with {done.returncode}: {done.stdout}{done.stderr}")
        return done.stdout

    def submit(self, *arguments: str | Path, **variables: str) -> int:
        """Submit a job by `sbatch ARGUMENTS`, and return its number. variables: added to the environment."""
        return int(self.run("sbatch", "--parsable", *arguments, **variables).split(";")[0])

    def show(self, job: int) -> dict[str, str]:
        """Fields of a job at the controller, also after its end: JobState, Reason, ExitCode, Restarts, ..."""
        words = self.run("scontrol", "show", "job", "--oneliner", str(job)).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, job: int, timeout: float = 300) -> str:
        """Wait for the end of the job, and return its last state. Raises TimeoutError."""
        return self.wait_for(job, lambda shown: shown["JobState"] in FINAL, timeout)["JobState"]

    def wait_for(self, job: int, reached: Callable[[dict[str, str]], bool], timeout: float = 300) -> dict[str, str]:
        """Wait until `reached` is true of the job's fields, and return them. Raises TimeoutError."""
        deadline = time.monotonic() + timeout
        while True:
            shown = self.show(job)
            if reached(shown):
                return shown
            if time.monotonic() > deadline:
                raise TimeoutError(f"after {timeout:.0f} s job {job} is {shown['JobState']} ({shown['Reason']})")
            time.sleep(0.2)

    def squeue(self) -> list[dict[str, str]]:
        """Rows of waiting and running jobs: id, name, state, reason, nodes."""
        return self._table("squeue", "--noheader", "--format=%i|%j|%T|%r|%N", names=("id", "name", "state", "reason", "nodes"))

    def sacct(self, job: int) -> list[dict[str, str]]:
        """Rows of the job and its steps in the accounting, a second or two late: id, name, state, exit, elapsed."""
        fields = "--format=JobID,JobName,State,ExitCode,Elapsed"
        command = ("sacct", "--noheader", "--parsable2", f"--jobs={job}", fields)
        return self._table(*command, names=("id", "name", "state", "exit", "elapsed"))

    def _table(self, *command: str, names: tuple[str, ...]) -> list[dict[str, str]]:
        return [dict(zip(names, line.split("|"), strict=True)) for line in self.run(*command).splitlines()]


# ---- the process that owns the daemons ----


def supervise(folder: Path, spank: bool) -> None:
    """Run a cluster until standard input is closed. Prints `ready` when it is up, or a line that says why it is not."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(1))
    pr_set_child_subreaper = 36
    ctypes.CDLL(None).prctl(pr_set_child_subreaper, 1)
    try:
        _start(folder, spank)
        print("ready", flush=True)
        while not select.select([sys.stdin], [], [], 1)[0]:
            _reap()
    except (RuntimeError, OSError) as error:
        print(str(error).replace("\n", " "), flush=True)
        sys.exit(1)
    except KeyboardInterrupt:
        pass
    finally:
        # Nobody needs the files any more, so kill everything at once. Killed processes leave orphans: repeat until none is left.
        while processes := _descendants():
            for process in processes:
                try:
                    os.kill(process, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            _reap()
            time.sleep(0.02)


def _start(folder: Path, spank: bool) -> None:
    # A job's step has a Unix socket among its node's files: with too long a path it would not start.
    if (spare := SOCKET_NAME - len(f"{folder}/spool-{NODES[0]}/{NODES[0]}_99999.4294967291")) < 0:
        raise RuntimeError(f"{folder}: {-spare} letters too many for Slurm's sockets in it: take a shorter folder")
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("log", "state", "tmp", *(f"spool-{node}" for node in NODES)):
        (folder / name).mkdir()
    controller, accounting, database, *ports = _free_ports(3 + len(NODES))
    names: dict[str, object] = dict(folder=folder, user=getpass.getuser(), host=socket.gethostname().split(".")[0])
    names |= dict(controller=controller, accounting=accounting, database=database, names=",".join(NODES), last=GPUS - 1)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20
    of_nodes = [dict(name=name, port=port, cpus=CPUS, gpus=GPUS, memory=memory) for name, port in zip(NODES, ports, strict=True)]
    names["nodes"] = "".join(NODE.format(**names, **node) for node in of_nodes)
    (folder / "slurm.conf").write_text(SLURM_CONF.format(**names))
    (folder / "gres.conf").write_text(GRES_CONF.format(**names))
    (folder / "slurmdbd.conf").touch(0o600)
    (folder / "slurmdbd.conf").write_text(SLURMDBD_CONF.format(**names))
    for gpu in range(GPUS):
        (folder / f"gpu{gpu}").touch()
    (folder / "plugstack.conf").write_text(f"required {_compiled_standin(folder)}\n" if spank else "")

    (folder / "munge.key").touch(0o600)
    (folder / "munge.key").write_bytes(os.urandom(128))
    files = [f"--{name}={folder}/{file}" for name, file in (("key-file", "munge.key"), ("socket", "munge.sock"))]
    files += [f"--{name}={folder}/munge.{name[:-5]}" for name in ("pid-file", "seed-file")]
    _daemon(folder, "munged", "--foreground", "--force", *files, f"--log-file={folder}/log/munged.log")

    # --tmpdir, too: two databases that are installed at the same time would else share temporary files.
    database_at = ["--no-defaults", f"--user={names['user']}", f"--datadir={folder}/mysql", f"--tmpdir={folder}/tmp"]
    _run("mariadb-install-db", *database_at, "--auth-root-authentication-method=normal", "--skip-test-db")
    (folder / "database.sql").write_text(DATABASE)
    small = ["--innodb-buffer-pool-size=64M", "--innodb-log-file-size=32M", "--innodb-lock-wait-timeout=900"]
    small += ["--innodb-flush-log-at-trx-commit=0", "--performance-schema=OFF", f"--init-file={folder}/database.sql"]
    where = ["--bind-address=127.0.0.1", f"--port={database}", f"--socket={folder}/mysql.sock", f"--pid-file={folder}/mysql.pid"]
    _daemon(folder, "mariadbd", *database_at, *where, *small)
    _until("mariadbd listens", lambda: _listens(database))
    _until("munged listens", (folder / "munge.sock").exists)
    _daemon(folder, "slurmdbd", "-D")
    _until("slurmdbd listens", lambda: _listens(accounting))
    _run("sacctmgr", "-i", "add", "cluster", "onebox")
    _run("sacctmgr", "-i", "add", "account", "flextron", "Description=tests", "Organization=tests")
    _run("sacctmgr", "-i", "add", "user", str(names["user"]), "Account=flextron", may_fail=True)  # user root is there already
    _daemon(folder, "slurmctld", "-D", "-c")
    for node in NODES:
        _daemon(folder, "slurmd", "-D", "-N", node)
    idle = ["sinfo", "--noheader", "--Node", "--states=idle", "--format=%N"]
    _until("two nodes are idle", lambda: set(_run(*idle, may_fail=True).split()) == set(NODES))


def _daemon(folder: Path, name: str, *arguments: str) -> None:
    with (folder / "log" / f"{name}.out").open("ab") as log:
        subprocess.Popen([name, *arguments], stdin=subprocess.DEVNULL, stdout=log, stderr=log)


def _run(*command: str, may_fail: bool = False) -> str:
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=STARTED)
    if done.returncode and not may_fail:
        raise RuntimeError(f"{' '.join(command[:4])} ended with {done.returncode}: {(done.stderr or done.stdout).strip()[-300:]}")
    return done.stdout


def _until(what: str, holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + STARTED
    while not holds():
        if time.monotonic() > deadline:
            raise RuntimeError(f"waited {STARTED:.0f} s until {what}")
        time.sleep(0.1)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _free_ports(count: int) -> list[int]:
    """Free ports below those of outgoing connections, chosen at random because another cluster may be starting."""
    found: list[int] = []
    while len(found) < count:
        port = random.SystemRandom().randrange(10000, 30000)
        with socket.socket() as probe:
            try:
                probe.bind(("0.0.0.0", port))
            except OSError:
                continue
        if port not in found:
            found.append(port)
    return found


def _compiled_standin(folder: Path) -> Path:
    library = folder / "pyxis_standin.so"
    source = Path(__file__).resolve().with_name("pyxis_standin.c")
    _run("gcc", "-shared", "-fPIC", "-O1", "-Wall", "-Werror", str(source), "-o", str(library))
    return library


def _search_path() -> str:
    """PATH with the directories of daemons, which an ordinary user's PATH lacks."""
    return os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])


def _descendants() -> list[int]:
    parents = {}
    for process in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(process.parent.name)] = int(process.read_text().rpartition(")")[2].split()[1])
        except OSError:  # the process has ended
            continue
    found = [os.getpid()]
    for process in found:
        found += [child for child, parent in parents.items() if parent == process]
    return found[1:]


def _reap() -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


if __name__ == "__main__":
    if problem := missing():
        sys.exit(problem)
    home = Path(sys.argv[1]).resolve()
    os.environ.update(Cluster(home).environment)
    if sys.stdin.isatty():
        print(f"export SLURM_CONF={home}/slurm.conf")
    supervise(home, spank="--no-spank" not in sys.argv)
