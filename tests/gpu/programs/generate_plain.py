"""A language-model program as tutorials write it: loads a model, moves it to the GPU, generates on request. It marks nothing.

A request is a line on standard input: `generate` answers `tokens DIGEST SECONDS`, where the digest covers the tokens and the
logits they were chosen from; `quit` ends it. The weights are random, the same for the same seed.
"""
import argparse
import hashlib
import sys
import tempfile
import time

import torch
from transformers import AutoModelForCausalLM, LlamaConfig


def arguments():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cuda")
    return parser.parse_args()


def make_checkpoint(args, folder):
    heads = args.hidden // 128
    config = LlamaConfig(
        vocab_size=32000, hidden_size=args.hidden, intermediate_size=4 * args.hidden, num_hidden_layers=args.layers,
        num_attention_heads=heads, num_key_value_heads=max(1, heads // 4), max_position_embeddings=4096,
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )
    torch.manual_seed(args.seed)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def load(args):
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(args, folder)
        # With the attention that PyTorch chooses itself, logits differed from request to request on an H200.
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="eager")
        return model.to(args.device).eval()


@torch.inference_mode()
def generate(model, prompts, args):
    begin = time.perf_counter()
    result = model.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=args.new_tokens, do_sample=False,
        return_dict_in_generate=True, output_logits=True,
    )
    digest = hashlib.sha256(result.sequences.cpu().numpy().tobytes())
    for logits in result.logits:
        digest.update(logits.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16], time.perf_counter() - begin


def main():
    args = arguments()
    model = load(args)
    prompts = torch.randint(1, 32000, (args.prompts, 24), generator=torch.Generator().manual_seed(args.seed)).to(args.device)
    print(f"ready {sum(p.numel() * p.element_size() for p in model.parameters())}", flush=True)
    for line in sys.stdin:
        if line.strip() == "generate":
            digest, seconds = generate(model, prompts, args)
            print(f"tokens {digest} {seconds:.3f}", flush=True)
        elif line.strip() == "quit":
            break


if __name__ == "__main__":
    main()
