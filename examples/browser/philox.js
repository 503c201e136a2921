// The random numbers of one image, as numpy's Philox generator gives them: Philox4x64 with ten rounds.

const MASK = (1n << 64n) - 1n;
const MULTIPLIERS = [0xd2e7470ee14c6c93n, 0xca5a826395121157n];
const WEYL = [0x9e3779b97f4a7c15n, 0xbb67ae8584caa73bn];

/** Four 64-bit numbers of a counter and a key of two. */
function block(counter, key) {
  let [a, b, c, d] = counter;
  let [k, l] = key;
  for (let round = 0; round < 10; round++) {
    const left = MULTIPLIERS[0] * a;
    const right = MULTIPLIERS[1] * c;
    [a, b, c, d] = [(right >> 64n) ^ b ^ k, right & MASK, (left >> 64n) ^ d ^ l, left & MASK];
    k = (k + WEYL[0]) & MASK;
    l = (l + WEYL[1]) & MASK;
  }
  return [a, b, c, d];
}

/**
 * Uniform numbers in [0, 1): number 2 t + h belongs to step t and head h (0 position, 1 content).
 * @param {bigint} seed 0 to 2^64 - 1
 * @param {bigint} image number of the image among those of the seed
 * @param {number} steps
 * @returns {Float32Array} 2 * steps multiples of 2^-24
 */
export function uniforms(seed, image, steps) {
  const numbers = new Float32Array(2 * steps);
  for (let i = 0; i < numbers.length; i += 4) {
    const raw = block([BigInt(i / 4 + 1), 0n, 0n, 0n], [seed, image]); // the first block has counter 1
    raw.slice(0, numbers.length - i).forEach((number, j) => {
      numbers[i + j] = Number(number >> 40n) * 2 ** -24;
    });
  }
  return numbers;
}
