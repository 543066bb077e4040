"""Matrix products in JAX: a digest of the same result for each line `compute`."""
import hashlib
import sys

import jax
import jax.numpy as jnp
import numpy


@jax.jit
def step(weights, x):
    for w in weights:
        x = jnp.tanh(x @ w)
    return x


def main():
    size = int(sys.argv[1])
    keys = jax.random.split(jax.random.PRNGKey(1), 9)
    weights = [jax.random.normal(key, (size, size), dtype=jnp.float32) / size**0.5 for key in keys[:8]]
    x = jax.random.normal(keys[8], (256, size), dtype=jnp.float32)
    jax.block_until_ready(weights)
    print(f"ready {sum(w.nbytes for w in weights)}", flush=True)
    for line in sys.stdin:
        if line.strip() == "compute":
            result = numpy.asarray(step(weights, x))
            print("result", hashlib.sha256(result.tobytes()).hexdigest()[:16], flush=True)
        elif line.strip() == "quit":
            break


if __name__ == "__main__":
    main()
