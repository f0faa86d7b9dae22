"""Reading scheduled HLO."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from lens_jax.aot import hlo

# A loop of 5 trips over a cache [4, 1024] of which a row is read and one is updated; fast memory
# is S(1).
TEXT = """\
HloModule example, is_scheduled=true

%sliced (p0: f32[4,1024], p1: s32[]) -> f32[1,1024] {
  %p0 = f32[4,1024]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %view = f32[4,1024]{1,0} bitcast(%p0)
  ROOT %row = f32[1,1024]{1,0} dynamic-slice(%view, %p1, %zero), dynamic_slice_sizes={1,1024}
}

%updated (q0: f32[4,1024], q1: f32[1,1024], q2: s32[]) -> f32[4,1024] {
  %q0 = f32[4,1024]{1,0} parameter(0)
  %q1 = f32[1,1024]{1,0} parameter(1)
  %q2 = s32[] parameter(2)
  %none = s32[] constant(0)
  ROOT %new = f32[4,1024]{1,0} dynamic-update-slice(%q0, %q1, %q2, %none)
}

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %z = f32[] add(%x, %y)
}

%body (state: (s32[], f32[4,1024])) -> (s32[], f32[4,1024]) {
  %state = (s32[], f32[4,1024]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %cache = f32[4,1024]{1,0} get-tuple-element(%state), index=1
  %fast = f32[1,1024]{1,0:T(1,128)S(1)} fusion(%cache, %i), kind=kLoop, calls=%sliced
  %sum = f32[1,1024]{1,0} all-reduce(%fast), channel_id=1, to_apply=%add
  %next = f32[4,1024]{1,0} fusion(%cache, %sum, %i), kind=kLoop, calls=%updated
  %one = s32[] constant(1)
  %after = s32[]{:T(128)S(6)} add(%i, %one)
  ROOT %out = (s32[], f32[4,1024]{1,0}) tuple(%after, %next)
}

%condition (past: (s32[], f32[4,1024])) -> pred[] {
  %past = (s32[], f32[4,1024]{1,0}) parameter(0)
  %n = s32[] constant(5)
  %j = s32[] get-tuple-element(%past), index=0
  ROOT %go = pred[] compare(%j, %n), direction=LT
}

ENTRY %main (a: (s32[], f32[4,1024])) -> (s32[], f32[4,1024]) {
  %a = (s32[], f32[4,1024]{1,0}) parameter(0)
  ROOT %loop = (s32[], /*index=1*/f32[4,1024]{1,0}) while(%a), condition=%condition, body=%body
}
"""


def test_loops_collectives_and_traffic():
    module = hlo.Module(TEXT)
    (loop,) = module.loops()
    assert module.trips(loop) == 5
    assert [i.name for i in module.collectives()] == ["sum"]
    row = 4 * 1024
    # The slice is read (its result stays in fast memory), the sum written and read, the row
    # written; and four scalars that the fusions and the counter read.
    assert module.traffic("body") == row + row + (row + row) + 4 * 4
    assert module.traffic() == 5 * module.traffic("body")


def test_cycles_and_collective_bytes_of_all_trips():
    text = TEXT.replace(
        "calls=%updated", 'calls=%updated, backend_config={"estimated_cycles":"700"}'
    )
    # Cut in two steps that share a channel, it is one transfer still.
    first = "  %sum = f32[1,1024]{1,0} all-reduce(%fast), channel_id=1, to_apply=%add\n"
    module = hlo.Module(text.replace(first, first + first.replace("%sum", "%again")))
    assert module.cycles("body") == 700 and module.cycles() == 5 * 700
    assert module.collective_bytes("body") == {"all-reduce": 2 * 4 * 1024}
    assert module.collective_bytes() == {"all-reduce": 5 * 2 * 4 * 1024}


SCATTER = """\
%all-reduce-scatter (in0: bf16[64,8], in1: f32[4,64]) -> (bf16[16,8], f32[4,16]) {
  %in0 = bf16[64,8]{1,0} parameter(0)
  %in1 = f32[4,64]{1,0} parameter(1)
  %both = (bf16[64,8]{1,0}, f32[4,64]{1,0}) all-reduce(%in0, %in1), channel_id=1, to_apply=%add
  %first = bf16[64,8]{1,0} get-tuple-element(%both), index=0
  %second = f32[4,64]{1,0} get-tuple-element(%both), index=1
  %origin = u32[] constant(0)
  %place = u32[] partition-id()
  %mine = bf16[16,8]{1,0} dynamic-slice(%first, %place, %origin), dynamic_slice_sizes={16,8}
  %own = f32[4,16]{1,0} dynamic-slice(%second, %origin, %place), dynamic_slice_sizes={4,16}
  ROOT %parts = (bf16[16,8]{1,0}, f32[4,16]{1,0}) tuple(%mine, %own)
}

ENTRY %main (a: bf16[64,8], b: f32[4,64]) -> (bf16[16,8], f32[4,16]) {
  %a = bf16[64,8]{1,0} parameter(0)
  %b = f32[4,64]{1,0} parameter(1)
  ROOT %fusion = (bf16[16,8]{1,0}, f32[4,16]{1,0}) fusion(%a, %b), kind=kCustom, \
calls=%all-reduce-scatter
}
"""


def test_an_all_reduce_of_which_each_keeps_its_part():
    sizes = 64 * 8 * 2 + 4 * 64 * 4
    assert hlo.Module(SCATTER).collective_bytes() == {"reduce-scatter": sizes}
    plain = """\
ENTRY %main (a: f32[8,4]) -> f32[2,4] {
  %a = f32[8,4]{1,0} parameter(0)
  ROOT %own = f32[2,4]{1,0} reduce-scatter(%a), channel_id=1, dimensions={0}, to_apply=%add
}
"""
    assert hlo.Module(plain).collective_bytes() == {"reduce-scatter": 8 * 4 * 4}
    kept = SCATTER.replace("tuple(%mine, %own)", "tuple(%first, %own)")
    kept = kept.replace("ROOT %parts = (bf16[16,8]{1,0}", "ROOT %parts = (bf16[64,8]{1,0}")
    assert hlo.Module(kept).collective_bytes() == {"all-reduce": 2 * sizes}


def test_a_gather_beside_other_work():
    """What fusions carry on, within loops too, counts where it starts; channels tell nothing."""
    part = """\
%{name} (p{name}: f32[2,4]) -> f32[8,4] {{
  %p{name} = f32[2,4]{{1,0}} parameter(0)
  %g{name} = f32[8,4]{{1,0}} all-gather(%p{name}), channel_id=1, dimensions={{0}}
  ROOT %r{name} = f32[8,4]{{1,0}} {rest}
}}

"""
    parts = {
        f"{name}.{i}": rest.format(f"{name}.{i}")
        for i in (1, 2)
        for name, rest in {
            "start": 'custom-call(%g{}), custom_call_target="AsyncCollectiveStart"',
            "async_collective_fusion": "negate(%g{})",
            "done": 'custom-call(%g{}), custom_call_target="AsyncCollectiveDone"',
        }.items()
    }
    text = "".join(part.format(name=name, rest=rest) for name, rest in parts.items())
    text += "ENTRY %main (a: f32[2,4]) -> f32[8,4] {\n  %a = f32[2,4]{1,0} parameter(0)\n"
    for name in parts:
        text += f"  %f.{name} = f32[8,4]{{1,0}} fusion(%a), kind=kCustom, calls=%{name}\n"
    module = hlo.Module(text + "}\n")
    assert module.collective_bytes() == {"all-gather": 2 * 8 * 4 * 4}


@pytest.mark.parametrize(
    ("op", "before"), [("all-gather", ""), ("all-gather-start", "(f32[2,4], bf16[3]), ")]
)
def test_gathers_of_several(op, before):
    text = f"""\
ENTRY %main (a: f32[2,4], b: bf16[3]) -> (f32[8,4], bf16[12]) {{
  %a = f32[2,4]{{1,0}} parameter(0)
  %b = bf16[3]{{0}} parameter(1)
  ROOT %both = ({before}(f32[8,4], bf16[12])) {op}(%a, %b), channel_id=1, dimensions={{0}}
}}
"""
    assert hlo.Module(text).collective_bytes() == {"all-gather": 8 * 4 * 4 + 12 * 2}


def test_a_loop_that_the_data_end():
    endless = TEXT.replace("direction=LT", "direction=NE")
    module = hlo.Module(endless)
    assert module.trips(module.loops()[0]) is None
    assert module.traffic(unknown_trips=3) == 3 * module.traffic("body")


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("bf16[2,3]{1,0:T(8,128)(2,1)}", 12),
        ("(f32[], pred[7]{0})", 11),
        ("bf16[2,3]{1,0:T(8,128)(2,1)S(1)}", 0),
        ("s4[10]{0}", 5),
        ("token[]", 0),
    ],
)
def test_sizes(shape, size):
    assert hlo.main_memory(shape) == size


def test_a_program_of_this_machine():
    def run(x):
        return lax.fori_loop(0, 7, lambda i, x: x @ x, x)

    text = jax.jit(run).lower(jnp.eye(64)).compile().as_text()
    module = hlo.Module(text)
    (loop,) = module.loops()
    assert module.trips(loop) == 7 and module.collectives() == []
    assert module.traffic() >= 7 * 3 * 64 * 64 * 4
