"""A small language-model server of the kind people run: builds a model, then generates text on request.

A request is a line on standard input: `generate` answers `tokens DIGEST SECONDS`, where the digest covers the tokens and
the logits they were chosen from; `memory` answers `memory ALLOCATED RESERVED` (bytes); `quit` ends it. The weights are
random, the same for the same seed.
"""
import argparse
import hashlib
import sys
import time

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, StaticCache

PROMPT_TOKENS = 24


def arguments():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cuda")
    return parser.parse_args()


def load_model(args):
    heads = args.hidden // 128
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=args.hidden,
        intermediate_size=4 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(args.seed)
    with torch.device(args.device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.eval()


def make_cache(model, args):
    config = model.config
    cache = StaticCache(config=config, max_cache_len=PROMPT_TOKENS + args.new_tokens)
    cache.early_initialization(
        batch_size=args.prompts,
        num_heads=config.num_key_value_heads,
        head_dim=config.hidden_size // config.num_attention_heads,
        dtype=torch.bfloat16,
        device=torch.device(args.device),
    )
    return cache


def generate(model, cache, prompts, args):
    cache.reset()
    begin = time.perf_counter()
    result = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        past_key_values=cache,
        max_new_tokens=args.new_tokens,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        disable_compile=True,
    )
    digest = hashlib.sha256(result.sequences.cpu().numpy().tobytes())
    for logits in result.logits:
        digest.update(logits.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16], time.perf_counter() - begin


def nvtx(name, args):
    # Without CUDA there is no NVTX in PyTorch either.
    return torch.cuda.nvtx.range(name) if args.device != "cpu" else torch.inference_mode()


@torch.inference_mode()
def main():
    args = arguments()
    with nvtx("load_weights", args):
        model = load_model(args)
    with nvtx("kv_cache", args):
        cache = make_cache(model, args)
    prompts = torch.randint(
        1, 32000, (args.prompts, PROMPT_TOKENS), generator=torch.Generator().manual_seed(args.seed)
    ).to(args.device)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    print(f"ready {weights}", flush=True)
    for line in sys.stdin:
        request = line.strip()
        if request == "generate":
            digest, seconds = generate(model, cache, prompts, args)
            print(f"tokens {digest} {seconds:.3f}", flush=True)
        elif request == "memory":
            print(f"memory {torch.cuda.memory_allocated()} {torch.cuda.memory_reserved()}", flush=True)
        elif request == "quit":
            break


if __name__ == "__main__":
    main()
