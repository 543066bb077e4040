"""Matrix products in PyTorch: a digest of the same result for each line `compute`."""
import hashlib
import sys

import torch


def step(weights, x):
    for w in weights:
        x = torch.tanh(x @ w)
    return x


def main():
    size = int(sys.argv[1])
    torch.manual_seed(1)
    weights = [torch.randn(size, size, device="cuda") / size**0.5 for _ in range(8)]
    x = torch.randn(256, size, device="cuda")
    torch.cuda.synchronize()
    print(f"ready {sum(w.nbytes for w in weights)}", flush=True)
    for line in sys.stdin:
        if line.strip() == "compute":
            result = step(weights, x).cpu().numpy()
            print("result", hashlib.sha256(result.tobytes()).hexdigest()[:16], flush=True)
        elif line.strip() == "quit":
            break


if __name__ == "__main__":
    main()
