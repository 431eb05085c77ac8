"""Hardware profiles: the shipped ones, a round trip, and every way of being malformed."""

import json

import pytest

from moesim.sim.profile import (
    Attention,
    Gpu,
    HardwareProfile,
    HostLink,
    Link,
    Links,
    Provenance,
    load_profile,
    shipped_profiles,
)
from moesim.traces import InputError


@pytest.mark.parametrize("name", shipped_profiles())
def test_shipped_profiles_load_and_say_that_they_are_spec_sheets(name):
    profile = load_profile(name)
    assert profile.name == name and profile.gpus == int(name.partition("x")[0])
    assert not profile.measured and profile.provenance.sources and "Not measured" in profile.provenance.notes
    assert profile.decide_s == {}
    assert {"float32", "bfloat16"} <= profile.gpu.matmul_flops_per_s.keys()


def test_shipped_numbers_are_those_of_the_data_sheets():
    h100, a100, ada = (load_profile(name) for name in ("8xH100-NVLink", "8xA100-NVLink", "4xRTX4090-PCIe"))
    assert [p.gpu.matmul_flops_per_s["bfloat16"] / 1e12 for p in (h100, a100, ada)] == [989, 312, 165]
    assert [p.gpu.hbm_bytes_per_s / 1e12 for p in (h100, a100, ada)] == [3.35, 2.04, 1.01]
    assert [p.gpu.memory_bytes / 1e9 for p in (h100, a100, ada)] == [80, 80, 24]
    assert h100.links.p2p.bytes_per_s == 450e9 and a100.links.p2p.bytes_per_s == 300e9 and ada.links.p2p is None
    assert ada.links.host.shared_by == 4


@pytest.mark.parametrize(
    ("name", "memory_gb", "hbm_tb_s", "bfloat16_tflops", "p2p_gb_s", "host_gb_s"),
    [
        ("8xH200-NVLink", 141, 4.8, 989, 450, 64),
        ("8xB200-NVLink", 180, 8.0, 2250, 900, 64),
        ("72xGB200-NVLink", 186, 8.0, 2500, 900, 450),
        ("1xRTX4090-PCIe", 24, 1.01, 165, None, 32),
    ],
)
def test_more_numbers_of_data_sheets(name, memory_gb, hbm_tb_s, bfloat16_tflops, p2p_gb_s, host_gb_s):
    profile = load_profile(name)
    p2p = profile.links.p2p
    found = (profile.gpu.memory_bytes / 1e9, profile.gpu.hbm_bytes_per_s / 1e12)
    assert found == (memory_gb, hbm_tb_s)
    assert profile.gpu.matmul_flops_per_s["bfloat16"] / 1e12 == bfloat16_tflops
    assert (p2p.bytes_per_s / 1e9 if p2p else None, profile.links.host.bytes_per_s / 1e9) == (p2p_gb_s, host_gb_s)


def test_several_nodes():
    cluster = load_profile("32xH100-IB")
    assert (cluster.gpus, cluster.node_size, cluster.links.network.bytes_per_s) == (32, 8, 400e9 / 8)
    assert load_profile("8xH100-NVLink").node_size == 8


def test_efficiencies_multiply_the_rates():
    gpu = load_profile("8xH100-NVLink").gpu
    assert gpu.matmul_rate("bfloat16") == 989e12 * gpu.matmul_efficiency
    assert gpu.attention_rate("bfloat16") == 989e12 * gpu.attention.efficiency
    assert gpu.hbm_rate == 3.35e12 * gpu.hbm_efficiency
    link = Link(latency_s=1e-6, bytes_per_s=1e9, efficiency=0.5)
    assert link.seconds(1e6) == 1e-6 + 2e-3


def test_a_missing_dtype_names_those_that_are_there():
    with pytest.raises(InputError, match="no matmul rate for int4; it has: bfloat16, float16, float32"):
        load_profile("8xH100-NVLink").gpu.matmul_rate("int4")


def measured(gpus=2):
    return HardwareProfile(
        name="here",
        provenance=Provenance(kind="measured", device="cpu", date="2026-01-01", versions={"torch": "2.9"}),
        gpus=gpus,
        gpu=Gpu(
            memory_bytes=2**30,
            hbm_bytes_per_s=1e10,
            matmul_flops_per_s={"float32": 1e11},
            tile_rows=1,
            launch_s=0.0,
            expert_s=1e-5,
            attention=Attention(launch_s=0, efficiency=1),
        ),
        links=Links(
            p2p=Link(latency_s=1e-5, bytes_per_s=1e9),
            host=HostLink(latency_s=0.0, bytes_per_s=1e9),
            all_to_all=Link(latency_s=1e-5, bytes_per_s=1e9),
        ),
        decide_s={"eplb": 1e-3},
    )


def test_what_is_saved_reads_back_equal(tmp_path):
    path = tmp_path / "deep" / "here.json"
    measured().save(path)
    assert load_profile(path) == measured()
    assert load_profile(str(path)).measured
    assert [p.name for p in path.parent.iterdir()] == ["here.json"]


def test_more_gpus_than_there_are():
    measured(gpus=2).check_gpus(1)
    for wrong in (3, 0):
        with pytest.raises(InputError, match=f"profile here has 2 GPUs, {wrong} cannot"):
            measured(gpus=2).check_gpus(wrong)


def test_an_unknown_name_lists_the_shipped_ones():
    with pytest.raises(InputError, match=r"'9xB300'.*32xH100-IB, 4xRTX4090-PCIe, 72xGB200-NVLink"):
        load_profile("9xB300")


def edit(path, **changes):
    """Set (or, to `...`, delete) fields by dotted name."""
    data = json.loads(path.read_text())
    for dotted, value in changes.items():
        *above, last = dotted.split(".")
        at = data
        for key in above:
            at = at[key]
        if value is ...:
            del at[last]
        else:
            at[last] = value
    path.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "not a hardware profile"),
        ({"format": ...}, "not a hardware profile"),
        ({"version": 2}, "field 'version' is 2, this moesim reads 1"),
        ({"version": True}, "field 'version' is True"),
        ({"gpu.tile_rows": ...}, "missing field 'gpu.tile_rows'"),
        ({"links.p2p": ...}, "missing field 'links.p2p'"),
        ({"gpu.colour": "red"}, "unknown field 'gpu.colour'"),
        ({"colour": 1}, "unknown field 'colour'"),
        ({"gpus": 0}, "gpus must be a positive number, got 0"),
        ({"gpus": 2.5}, "field 'gpus' must be an integer, got 2.5"),
        ({"gpus": True}, "field 'gpus' must be an integer, got True"),
        ({"name": 3}, "field 'name' must be a text, got 3"),
        ({"gpu.hbm_bytes_per_s": 0}, "gpu.hbm_bytes_per_s must be a positive number, got 0"),
        ({"gpu.hbm_bytes_per_s": float("nan")}, "gpu.hbm_bytes_per_s must be a positive number, got nan"),
        ({"gpu.hbm_bytes_per_s": float("inf")}, "gpu.hbm_bytes_per_s must be a positive number, got inf"),
        ({"gpu.hbm_bytes_per_s": 10**400}, "gpu.hbm_bytes_per_s must be a positive number"),
        ({"gpu.hbm_bytes_per_s": "fast"}, "field 'gpu.hbm_bytes_per_s' must be a number, got 'fast'"),
        ({"gpu.hbm_bytes_per_s": None}, "field 'gpu.hbm_bytes_per_s' must be a number, got None"),
        ({"gpu.launch_s": -1e-6}, "gpu.launch_s must be a number, not negative"),
        ({"gpu.attention.efficiency": 1.5}, r"gpu.attention.efficiency must lie in \(0, 1\], got 1.5"),
        ({"gpu.attention": 3}, "field 'gpu.attention' must be an object"),
        ({"gpu.matmul_flops_per_s": {}}, "gpu.matmul_flops_per_s must name at least one dtype"),
        ({"gpu.matmul_flops_per_s.float32": -1}, "gpu.matmul_flops_per_s.float32 must be a positive number"),
        ({"gpu.matmul_flops_per_s": [1]}, "field 'gpu.matmul_flops_per_s' must be a list or an object"),
        ({"gpus_per_node": 1}, "2 nodes need links.network"),
        ({"gpus": 3, "gpus_per_node": 2}, "gpus_per_node 2 does not divide 3 GPUs"),
        ({"gpus_per_node": 0}, "gpus_per_node must be a positive number"),
        ({"links.network": {"latency_s": 0}}, "missing field 'links.network.bytes_per_s'"),
        ({"links.host.shared_by": 0}, "links.host.shared_by must be a positive number"),
        ({"links.all_to_all": None}, "field 'links.all_to_all' must be an object"),
        ({"links.p2p.latency_s": float("nan")}, "links.p2p.latency_s must be a number, not negative, got nan"),
        ({"decide_s.eplb": -1.0}, "decide_s.eplb must be a number of seconds"),
        ({"decide_s.eplb": "slow"}, "field 'decide_s.eplb' must be a number, got 'slow'"),
        ({"provenance.kind": "guess"}, "provenance.kind must be one of spec-sheet, measured, got 'guess'"),
        ({"provenance.sources": [3]}, r"field 'provenance.sources\[0\]' must be a text"),
    ],
)
def test_a_malformed_profile_is_one_line_with_file_and_field(tmp_path, change, message):
    path = tmp_path / "node.json"
    measured().save(path)
    edit(path, **change)
    with pytest.raises(InputError, match=message) as caught:
        load_profile(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", b"\xff\xfe", b"null", b"[" * 100_000])
def test_what_is_not_a_profile_at_all(tmp_path, content):
    path = tmp_path / "node.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"node\.json: not a"):
        load_profile(path)
