"""Matrix products in PyTorch: a digest of the same result for each line `compute`.

Arguments: the size of a matrix, and the number of devices whose memory they lie in by turns (1).
"""
import hashlib
import sys

import torch


def step(weights, x):
    for w in weights:
        x = torch.tanh(x.to(w.device) @ w)
    return x


def main():
    size = int(sys.argv[1])
    devices = int(sys.argv[2]) if len(sys.argv) > 2 else 1
    torch.manual_seed(1)
    weights = [torch.randn(size, size, device=f"cuda:{i % devices}") / size**0.5 for i in range(8 * devices)]
    x = torch.randn(256, size, device="cuda")
    for device in range(devices):
        torch.cuda.synchronize(device)
    print(f"ready {sum(w.nbytes for w in weights)}", flush=True)
    for line in sys.stdin:
        if line.strip() == "compute":
            result = step(weights, x).cpu().numpy()
            print("result", hashlib.sha256(result.tobytes()).hexdigest()[:16], flush=True)
        elif line.strip() == "quit":
            break


if __name__ == "__main__":
    main()
