"""Attention in f64 on exactly code * scale, and the a-priori bound of docs/kernel-error.md for each output."""

import math

import torch

from launch import DEV

U16, U32 = 2.0**-11, 2.0**-24


def reference(cache, table_rows, kv_lens, q, window, soft_cap, scale, alibi, sinks, arithmetic):
    """f64 attention on exactly code * scale, and the a-priori bound of docs/kernel-error.md for each output.

    arithmetic: "mma", "whole" (mma of variants whose groups are the whole head) or "f32".
    """
    mma, whole = arithmetic != "f32", arithmetic == "whole"
    batch, q_len, q_heads, dim = q.shape
    gqa = q_heads // cache.heads
    out = torch.zeros(q.shape, dtype=torch.float64, device=DEV)
    bound = torch.zeros_like(out)
    lse = torch.full(q.shape[:3], -math.inf, dtype=torch.float64, device=DEV)
    lse_bound = torch.zeros_like(lse)
    for r in range(batch):
        n = kv_lens[r]
        sink = None if sinks is None else sinks.double()
        if n > 0:
            pos = torch.arange(n, device=DEV)
            pages = table_rows[r].to(torch.int64)[pos // cache.page_len]
            good = (pages >= 0) & (pages < cache.num_pages)
            pages = torch.where(good, pages, 0)
            slots = pos % cache.page_len

            def plane(i, group):
                codes = cache.codes[i][pages, slots].double()
                s = cache.scales[i][pages, slots].double()
                s = torch.where(good[:, None, None], s, 0.0)
                return codes * s.repeat_interleave(group, -1), s.amax(-1)

            k, ks = plane(0, cache.k_group)  # [n, heads, dim]
            v, vs = plane(1, cache.v_group)
        for i in range(q_len):
            p = n - q_len + i
            hi, lo = max(0, p + 1), max(0, p - window + 1) if window else 0
            qd = q[r, i].double().view(cache.heads, gqa, dim)
            if hi > lo and bool(good[lo:hi].any()):
                kk, vv, g = k[lo:hi], v[lo:hi], good[lo:hi]
                s = torch.einsum("hgd,thd->hgt", qd, kk) * scale
                mag = torch.einsum("hgd,thd->hgt", qd.abs(), kk.abs()) * scale
                # f16 operands round q (f32 only) and k, sums of 16 in the tensor core then f32; q and k far below the row's
                # largest lose an absolute amount.
                if whole:
                    # q as a fixed-point number of its row, integer sums, one scale a row.
                    tiny = 0.5 / 16319 * qd.abs().amax(-1)[:, :, None] * kk.abs().sum(-1).T[:, None, :] * scale
                    delta = mag * 6 * U32 + tiny
                elif mma:
                    u_op = U16 + (U16 if q.dtype == torch.float32 else 0.0) + (U16 if cache.scale == "f32" else 0.0)
                    tiny = (2.0**-39 * qd.abs().amax(-1)[:, :, None] * kk.abs().sum(-1).T[:, None, :]
                            + 2.0**-24 * ks[lo:hi].T[:, None, :] * qd.abs().sum(-1)[:, :, None] * (cache.scale != "f16" or bool((ks[lo:hi] >= 256).any()))) * scale
                    delta = mag * (u_op + (dim / 16 + 4) * 2.0**-22) + tiny
                else:
                    delta = mag * (dim + 6) * U32
                if soft_cap:
                    x = s / soft_cap
                    s = soft_cap * torch.tanh(x)
                    delta = delta + soft_cap * 2.0**-20 + s.abs() * 4 * U32
                delta = delta + s.abs() * 6 * U32
                if alibi is not None:
                    bias = alibi.double().view(cache.heads, gqa)[:, :, None] * (torch.arange(lo, hi, device=DEV) - p)
                    s = s + bias
                    delta = delta + bias.abs() * 4 * U32
                s = torch.where(g[None, None, :], s, -math.inf)
                m = s.amax(-1, keepdim=True)
                delta = delta + (s - m).abs().clamp(max=1e4) * 4 * U32 + 2.0**-21
                w = torch.exp(s - m)
                l = w.sum(-1, keepdim=True)
                total = l
                if sink is not None:
                    sk = sink.view(cache.heads, gqa, 1)
                    total_m = torch.maximum(m, sk)
                    w = w * torch.exp(m - total_m)
                    total = l * torch.exp(m - total_m) + torch.exp(sk - total_m)
                    m = total_m
                prob = w / total
                o = torch.einsum("hgt,thd->hgd", prob, vv)
                e = torch.expm1(delta.clamp(max=50))
                pe = prob * e
                pe = torch.where(torch.isfinite(pe), pe, 0.0)
                spread = torch.einsum("hgt,thd->hgd", pe, vv.abs()) + pe.sum(-1, keepdim=True) * o.abs()
                a = torch.einsum("hgt,thd->hgd", prob, vv.abs())
                count = hi - lo
                steps = count / 16 + 40
                u_val = (2 * U16 + (U16 if cache.scale == "f32" else 0.0) + steps * 2.0**-22) if mma else (count + 40) * U32
                denominator = (1 - pe.sum(-1, keepdim=True)).clamp(min=1e-3)
                if whole:
                    u_val = U16 + 2.0**-14 + 2 * steps * 2.0**-22
                b = (spread / denominator + a * (u_val + (count + 40) * U32)) * 1.02
                b = b + count * 2.0**-149 * vv.abs().amax(0)[:, None, :] / total
                if whole:
                    # The surplus of 128 in and out again; f16 weights far below the largest; flushed weights.
                    shares = prob * vs[lo:hi].T[:, None, :]
                    b = b + 2.0**-13 * shares.sum(-1, keepdim=True) + count * 2.0**-24 * shares.amax(-1, keepdim=True)
                    b = b + count * 2.0**-125 * vv.abs().amax(0)[:, None, :] / total
                elif mma:
                    # f16 weights below 2^-14 of 2^8 * the running reference, normalized scales below f16's normal range.
                    top = vv.abs().amax(0)[:, None, :]
                    b = b + count * 2.0**-32 * top / total + 2.0**-24 * (prob * vs[lo:hi].T[:, None, :]).sum(-1, keepdim=True)
                    if cache.scale != "f16" or bool((vs[lo:hi] >= 256).any()):
                        b = b + count * 2.0**-24 * (prob * vs[lo:hi].T[:, None, :]).amax(-1, keepdim=True)
                    if cache.scale == "f16" and bool((vs[lo:hi] >= 256).any()):
                        # Such a tile leaves weights 9 bits less room (kWideMargin): the largest may be 1/2, and values that are
                        # not normalized meet weights that lose 2^-25 of 1.
                        narrow = torch.where(vs[lo:hi] >= 256, torch.exp2(7 - torch.floor(torch.log2(vs[lo:hi].clamp(min=1.0)))), 1.0)
                        b = b + count * 2.0**-24 * (vv.abs() * narrow[:, :, None]).amax(0)[:, None, :] / total
                out[r, i] = o.view(q_heads, dim)
                bound[r, i] = b.view(q_heads, dim)
                lse[r, i] = (m[..., 0] + torch.log(total[..., 0])).view(q_heads)
                lse_bound[r, i] = (pe.sum(-1) / denominator[..., 0] + (count + 40) * U32 + lse[r, i].view(cache.heads, gqa).abs() * 4 * U32 + 1e-6).view(q_heads)
            elif sink is not None:
                lse[r, i] = sink
                lse_bound[r, i] = sink.abs() * 4 * U32
    return out, bound, lse, lse_bound


def store_bound(out, bound, out_type):
    u = {"f16": 2.0**-11, "bf16": 2.0**-8, "f32": 2.0**-24}[out_type]
    eta = {"f16": 2.0**-25, "bf16": 2.0**-134, "f32": 2.0**-149}[out_type]
    return bound * (1 + u) + out.abs() * u + eta + 1e-42
