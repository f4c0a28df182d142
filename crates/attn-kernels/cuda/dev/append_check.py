"""Append and dequantize against numpy, bit for bit."""

import math
import struct
import time

import numpy as np
import torch

from launch import DEV, FLOATS, Cache


def to_bf16_bits(x):
    b = x.view(np.uint32).astype(np.uint64)
    return ((b + 0x7FFF + ((b >> 16) & 1)) >> 16).astype(np.uint16)


def bits_to_f32(bits, scale):
    if scale == "f16":
        return bits.view(np.float16).astype(np.float32)
    if scale == "bf16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.view(np.float32)


def quantize(x, group, scale):
    """The rule of the format on f32 values [.., dim]: codes, scale bits."""
    g = x.reshape(*x.shape[:-1], -1, group)
    amax = np.abs(g).max(-1)
    with np.errstate(all="ignore"):
        quotient = amax / np.float32(127)
        if scale == "f32":
            bits = quotient.astype(np.float32).view(np.uint32)
            below = quotient.astype(np.float64) * 127 < amax.astype(np.float64)
        elif scale == "f16":
            bits = quotient.astype(np.float16).view(np.uint16)
            below = bits_to_f32(bits, scale).astype(np.float64) * 127 < amax
        else:
            bits = to_bf16_bits(quotient)
            below = bits_to_f32(bits, scale).astype(np.float64) * 127 < amax
        bits = (bits + below.astype(bits.dtype)).astype(bits.dtype)
        bits = np.where(amax == 0, 0, bits).astype(bits.dtype)
        s = bits_to_f32(np.ascontiguousarray(bits), scale)
        codes = np.clip(np.rint(g / s[..., None]), -127, 127)
        codes = np.where(amax[..., None] == 0, 0, codes)
    return np.nan_to_num(codes).astype(np.int8).reshape(x.shape), bits


def check_append(kernels, seconds, seed):
    begin, elements, failures, calls = time.time(), 0, 0, 0
    while time.time() - begin < seconds:
        rng = np.random.default_rng(seed)
        seed += 1
        pick_ = lambda *xs: xs[rng.integers(len(xs))]
        dim = pick_(64, 96, 128, 192, 256)
        groups = [g for g in (8, 16, 32, 64, 128) if dim % g == 0 and g <= dim] + [dim]
        k_group, v_group = pick_(*groups), pick_(*groups)
        layout = pick_("lightllm", "native", "hnd", "nhd")
        if layout == "lightllm":
            v_group = k_group
        page_len = 1 if layout == "lightllm" else pick_(1, 16, 64)
        heads, scale, kind = pick_(1, 2, 3, 8), pick_("f16", "bf16", "f32"), pick_("f16", "bf16", "f32")
        tokens = int(pick_(1, 7, 64, 1000, 4096 if dim <= 128 else 1000))
        num_pages = -(-tokens // page_len) + 2
        cache = Cache(layout, num_pages, page_len, heads, dim, k_group, v_group, scale)
        dtype = FLOATS[kind][1]
        mode = pick_("normal", "patterns", "mixed", "zeros")
        stride = heads * dim + pick_(0, 0, 8, 3)
        data = []
        for _ in range(2):
            if mode == "patterns" and kind != "f32":
                raw = torch.from_numpy((rng.integers(0, 65536, tokens * stride)).astype(np.uint16).view(np.int16)).to(DEV).view(dtype)
                top = 60000.0 if scale == "f16" else 3e38
                x = torch.where(torch.isfinite(raw) & (raw.abs() <= top), raw, torch.zeros_like(raw))
            else:
                x = torch.randn(tokens * stride, device=DEV)
                if mode == "mixed":
                    x = x * torch.exp2(torch.randn(tokens * stride, device=DEV) * 6)
                if mode == "zeros":
                    x = torch.where(torch.rand(tokens * stride, device=DEV) < 0.9, torch.zeros_like(x), x * 1e-6)
                x = x.clamp(-60000, 60000).to(dtype)
            data.append(x)
        slots = rng.permutation(num_pages * page_len)[:tokens].astype(np.int64)
        slots[rng.random(tokens) < 0.05] = -1
        bad = rng.random() < 0.2
        poisoned = {}
        if bad and tokens > 4:
            slots[1] = rng.choice([-2, num_pages * page_len, 2**40])
            t, i, h, c = 2, int(rng.integers(2)), int(rng.integers(heads)), int(rng.integers(dim))
            data[i][t * stride + h * dim + c] = float(rng.choice([math.nan, math.inf, -math.inf] + ([1e9] if scale == "f16" and kind != "f16" else [])))
            poisoned = {(t, i, h)}
        before = [b.clone() for b in cache.buffers]
        error = torch.zeros(8, dtype=torch.int32, device=DEV)
        slot_map = torch.from_numpy(slots).to(DEV)
        params = cache.pack() + struct.pack("<6Q2I", data[0].data_ptr(), data[1].data_ptr(), slot_map.data_ptr(), error.data_ptr(),
                                            stride, stride, tokens, FLOATS[kind][0])
        lanes = 4 if dim <= 64 else 8 if dim <= 128 else 16
        blocks = -(-tokens * heads // (256 // lanes))
        kernels.launch("kv8_append", (min(blocks, int(pick_(blocks, 132 * 8, 5))), 1, 1), (256, 1, 1), params)
        torch.cuda.synchronize()
        calls += 1
        # What the buffers must hold: the state before, with the rule's bytes in the right places.
        after = [b.clone() for b in cache.buffers]
        for b, old in zip(cache.buffers, before):
            b.copy_(old)
        ok_slots = (slots >= 0) & (slots < num_pages * page_len)
        live = np.nonzero(ok_slots)[0]
        if len(live) == 0:
            continue
        for i, group in ((0, k_group), (1, v_group)):
            x = data[i].float().view(tokens, stride)[:, : heads * dim].cpu().numpy().reshape(tokens, heads, dim)
            codes, bits = quantize(x[live], group, scale)
            page = torch.from_numpy(slots[live] // page_len).to(DEV)
            slot = torch.from_numpy(slots[live] % page_len).to(DEV)
            keep = torch.ones((len(live), heads), dtype=torch.bool, device=DEV)
            for t, pi, h in poisoned:
                if pi == i and t in live:
                    keep[list(live).index(t), h] = False
            new_codes = torch.from_numpy(codes).to(DEV)
            signed = bits.view(np.int32 if scale == "f32" else np.int16)
            new_bits = torch.from_numpy(np.ascontiguousarray(signed)).to(DEV)
            code_view, scale_view = cache.codes[i], cache.scales[i].view(torch.int32 if scale == "f32" else torch.int16)
            code_view[page, slot] = torch.where(keep[..., None], new_codes, code_view[page, slot])
            scale_view[page, slot] = torch.where(keep[..., None], new_bits, scale_view[page, slot])
            elements += codes.size
        good = all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(after, cache.buffers))
        expect_error = bool(poisoned) and (2 in live or (slots[1] != -1 and not ok_slots[1]))
        good &= (int(error[0]) != 0) == expect_error
        if good:
            good = check_dequantize(kernels, cache, after, page_len, rng)
        if not good:
            failures += 1
            if failures < 6:
                print(f"  FAIL append seed {seed - 1} dim {dim} groups {k_group}/{v_group} {layout} {scale} {kind} {mode} error {error.tolist()}")
    print(f"append: {calls} calls, {elements} elements, {failures} failures")
    return failures == 0


def check_dequantize(kernels, cache, buffers, page_len, rng):
    for b, new in zip(cache.buffers, buffers):
        b.copy_(torch.where(new.view(torch.uint8) == 0xFF, 0, new.view(torch.uint8)).view(new.dtype) if b.dtype == torch.int8 else torch.nan_to_num(new))
    count = cache.num_pages * page_len
    table = torch.from_numpy(rng.permutation(cache.num_pages).astype(np.int32)).to(DEV)
    begin, end = sorted(int(x) for x in rng.integers(0, count + 1, 2))
    if begin == end:
        return True
    name = ("f16", "bf16", "f32")[rng.integers(3)]
    out = [torch.full((end - begin, cache.heads, cache.dim), float("nan"), dtype=FLOATS[name][1], device=DEV) for _ in range(2)]
    error = torch.zeros(8, dtype=torch.int32, device=DEV)
    params = cache.pack(table.data_ptr(), 0, cache.num_pages) + struct.pack("<3Q4I", out[0].data_ptr(), out[1].data_ptr(), error.data_ptr(), 0, begin, end, FLOATS[name][0])
    lanes = 8 if cache.dim <= 64 else 16 if cache.dim <= 128 else 32
    kernels.launch("kv8_dequantize", (-(-(end - begin) * cache.heads // (256 // lanes)), 1, 1), (256, 1, 1), params)
    torch.cuda.synchronize()
    pos = torch.arange(begin, end, device=DEV)
    page, slot = table.long()[pos // page_len], pos % page_len
    for i, group in ((0, cache.k_group), (1, cache.v_group)):
        want = cache.codes[i][page, slot].float() * cache.scales[i][page, slot].float().repeat_interleave(group, -1)
        if not torch.equal(torch.nan_to_num(want.to(FLOATS[name][1])), torch.nan_to_num(out[i])):
            return False
    return True
