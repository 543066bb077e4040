"""Matrix products in CuPy: a digest of the same result for each line `compute`."""
import hashlib
import sys

import cupy


def step(weights, x):
    for w in weights:
        x = cupy.tanh(x @ w)
    return x


def main():
    size = int(sys.argv[1])
    random = cupy.random.RandomState(1)
    weights = [random.standard_normal((size, size), dtype=cupy.float32) / size**0.5 for _ in range(8)]
    x = random.standard_normal((256, size), dtype=cupy.float32)
    cupy.cuda.Device().synchronize()
    print(f"ready {sum(w.nbytes for w in weights)}", flush=True)
    for line in sys.stdin:
        if line.strip() == "compute":
            result = cupy.asnumpy(step(weights, x))
            print("result", hashlib.sha256(result.tobytes()).hexdigest()[:16], flush=True)
        elif line.strip() == "quit":
            break


if __name__ == "__main__":
    main()
