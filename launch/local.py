"""Runs a command as several processes of this machine, each with CPU devices of its own: a pod in small.

    python launch/local.py --processes 2 --devices 2 -- \\
        python -m navil_jax.train --config configs/demo.py --config.workdir=runs/two

Every process is told of the others (JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID), and they train as the
hosts of a pod do: here is where to try a recipe's mesh or a change of the code before renting one. Each line of output
begins with the number of its process.

Ctrl-C and SIGTERM reach all processes as SIGTERM, upon which training saves a checkpoint and stops; a second one kills
them. When one process fails the others are ended, and its exit status is returned.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
import time

GRACE_SECONDS = 3  # for the others to end by themselves, after one failed


def main() -> int:
    parser = argparse.ArgumentParser(
        usage="%(prog)s [-h] [--processes N] [--devices M] -- COMMAND...",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--processes", type=int, default=2, metavar="N", help="processes, the hosts of the pod (2)")
    parser.add_argument("--devices", type=int, default=2, metavar="M", help="CPU devices of each process (2)")
    parser.add_argument("command", nargs="+", metavar="COMMAND", help="what each process runs")
    options = parser.parse_args()
    if options.processes < 1 or options.devices < 1:
        parser.error("--processes and --devices must be at least 1")
    address = f"127.0.0.1:{_free_port()}"
    processes: list[subprocess.Popen[str]] = []
    _pass_on_signals(processes)
    try:
        for number in range(options.processes):
            processes.append(_start(options, number, address))
        printers = [threading.Thread(target=_print_lines, args=pair) for pair in enumerate(processes)]
        for printer in printers:
            printer.start()
        status = _wait(processes)
    except OSError as error:
        parser.error(f"cannot run {options.command[0]}: {error.strerror}")
    finally:
        for process in processes:
            process.kill()
    for printer in printers:
        printer.join()
    return status


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def _start(options: argparse.Namespace, number: int, address: str) -> subprocess.Popen[str]:
    settings = {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={options.devices}",
        # The size of XLA's thread pool: with no more threads than devices, collectives in flight can block one another.
        "NPROC": str(max(32, 8 * options.devices)),
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_COORDINATOR_BIND_ADDRESS": address,
        "JAX_NUM_PROCESSES": str(options.processes),
        "JAX_PROCESS_ID": str(number),
        # JAX keeps what process 0 compiled: it would be so far ahead of the rest that they lose each other.
        "JAX_ENABLE_COMPILATION_CACHE": "false",
    }
    return subprocess.Popen(
        options.command,
        env=os.environ | settings,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # the terminal's Ctrl-C comes here alone
    )


def _pass_on_signals(processes: list[subprocess.Popen[str]]) -> None:
    sent: list[int] = []

    def pass_on(number: int, _: object) -> None:
        for process in processes:
            process.send_signal(signal.SIGKILL if sent else signal.SIGTERM)
        sent.append(number)

    signal.signal(signal.SIGINT, pass_on)
    signal.signal(signal.SIGTERM, pass_on)


def _print_lines(number: int, process: subprocess.Popen[str]) -> None:
    for line in process.stdout or ():
        print(f"{number}: {line}", end="", flush=True)


def _wait(processes: list[subprocess.Popen[str]]) -> int:
    """The status of the first process that fails (128 + signal if killed by one), or 0 when all have ended well.

    The others notice a death within milliseconds and end with a status of their own, so of processes found together
    the one that a signal killed counts as first.
    """
    while not (failed := [process for process in processes if process.poll()]):
        if all(process.returncode == 0 for process in processes):
            return 0
        time.sleep(0.05)
    until = time.monotonic() + GRACE_SECONDS
    while any(process.poll() is None for process in processes) and time.monotonic() < until:
        time.sleep(0.05)
    status = min(process.returncode for process in failed)
    return status if status > 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main())
