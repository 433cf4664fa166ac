"""utils.py: seeds, devices, precision; and that the tests themselves stay off the network."""

import itertools
import logging
import socket

import numpy as np
import pytest
import torch

from utils import (
    autocast,
    check_folder,
    first_on_machine,
    has_bfloat16,
    join_processes,
    log,
    machine,
    mix,
    pick_device,
    profile,
    start_logging,
)

CPU = torch.device("cpu")


def test_mix_is_a_function_of_all_its_numbers_and_their_order():
    seeds = {mix(a, b, c) for a in range(6) for b in range(6) for c in range(6)}
    assert len(seeds) == 6**3 and mix(1, 2, 3) == mix(1, 2, 3)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_outside_a_clone_a_machine_has_no_commit_and_git_says_nothing(monkeypatch, tmp_path, capfd):
    monkeypatch.setattr("utils.__file__", str(tmp_path / "utils.py"))
    assert machine(CPU)["commit"] is None
    assert capfd.readouterr() == ("", "")


def test_mix_tells_zeros_at_the_end_apart_and_keeps_every_other_seed():
    numbers = [part for length in range(1, 6) for part in itertools.product((0, 1, 3), repeat=length)]
    assert len({mix(*part) for part in numbers}) == len(numbers)
    for numbers in ((3, 4), (7, 0, 2), (1,)):
        before = np.random.SeedSequence(numbers).generate_state(1, np.uint64).item() >> 1
        assert mix(*numbers) == before  # recorded results stay what they are


def test_mix_spreads_neighbouring_steps_over_the_bits_that_torch_keeps():
    """torch's CPU generator keeps 32 bits of a seed."""
    low = [mix(0, 2, step) % 2**32 for step in range(200)]
    assert len(set(low)) == 200
    assert 0.4 < sum(bin(seed).count("1") for seed in low) / (200 * 32) < 0.6


def test_auto_takes_cuda_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto") == torch.device("cuda")


def test_a_device_is_taken_by_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("cpu") == CPU and pick_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ValueError, match="--device cuda:2: this machine has 2 CUDA devices"):
        pick_device("cuda:2")


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "", "meta", "mps"])
def test_an_unknown_device_is_refused_and_the_known_ones_are_listed(name):
    with pytest.raises(ValueError, match=f"--device {name}: expected auto, cpu, cuda or cuda:N"):
        pick_device(name)


def test_cuda_is_refused_where_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match="--device cuda: this machine has 0 CUDA devices"):
        pick_device("cuda")


def test_each_process_of_torchrun_takes_a_gpu_of_its_own(monkeypatch):
    joined, taken = [], []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr("torch.distributed.init_process_group", lambda backend, **_: joined.append(backend))
    assert join_processes("auto") == torch.device("cuda") and not joined  # not started by torchrun
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert join_processes("auto") == torch.device("cuda:1") and taken == [torch.device("cuda:1")]
    assert join_processes("cpu") == CPU and joined == ["nccl", "gloo"]
    with pytest.raises(ValueError, match="--device cuda:0: torchrun gives each process a GPU of its own"):
        join_processes("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="--device cuda:2: this machine has 2 CUDA devices"):
        join_processes("auto")


@pytest.mark.parametrize(("rank", "order"), [("0", ["block", "barrier"]), ("1", ["barrier", "block"])])
def test_the_first_process_of_a_machine_goes_ahead(monkeypatch, rank, order):
    seen = []
    monkeypatch.setenv("LOCAL_RANK", rank)
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.barrier", lambda: seen.append("barrier"))
    with first_on_machine():
        seen.append("block")
    assert seen == order


def test_one_process_of_many_speaks(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "3")
    start_logging()
    log.info("unheard")
    log.warning("heard")
    assert capsys.readouterr().out == "heard\n"
    logging.getLogger().handlers.clear()


def test_no_profile_is_made_where_none_is_asked_for(tmp_path):
    with profile(tmp_path / "trace.json", 0) as step:
        step()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("capability", "native"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_bfloat16_is_native_from_ampere_on(monkeypatch, capability, native):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert has_bfloat16(torch.device("cuda")) is native


@pytest.mark.parametrize(
    ("precision", "native", "dtype"),
    [
        ("float32", True, torch.float32),
        ("bfloat16", False, torch.bfloat16),
        ("auto", True, torch.bfloat16),
        ("auto", False, torch.float32),
    ],
)
def test_autocast_follows_the_setting_and_auto_follows_the_machine(monkeypatch, precision, native, dtype):
    monkeypatch.setattr("utils.has_bfloat16", lambda device: native)
    x = torch.ones(2, 2)
    with autocast(CPU, precision):
        assert (x @ x).dtype == dtype
    assert (x @ x).dtype == torch.float32


def test_float32_inside_a_context_of_bfloat16_is_float32():
    x = torch.ones(2, 2)
    with autocast(CPU, "bfloat16"):
        with autocast(CPU, "float32"):
            assert (x @ x).dtype == torch.float32
        assert (x @ x).dtype == torch.bfloat16


def test_auto_on_a_cpu_without_avx512_is_float32(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert has_bfloat16(CPU) is False


def test_logging_writes_plain_lines_to_standard_output(capsys):
    start_logging()
    log.info("a line")
    assert capsys.readouterr().out == "a line\n"
    logging.getLogger().handlers.clear()  # they hold this test's standard output


def test_tests_cannot_leave_this_machine():
    with pytest.raises(ConnectionRefusedError, match="tests use no network"):
        socket.create_connection(("192.0.2.1", 80), timeout=1)  # an address kept for documentation, RFC 5737
    with pytest.raises(socket.gaierror, match="tests use no network"):
        socket.getaddrinfo("example.org", 443)
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        assert client.getpeername() == server.getsockname()


def test_a_file_where_a_folder_shall_be_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below" / "it"):
        with pytest.raises(ValueError, match=f"--out {path}: {tmp_path / 'file'} is a file, expected a folder"):
            check_folder(path, "--out")
    assert check_folder(tmp_path / "new" / "one", "--out") == tmp_path / "new" / "one"
