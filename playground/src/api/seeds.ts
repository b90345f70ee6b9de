// Seeds have 63 bits, more than a number of JavaScript holds: they are kept as digits.

const SEED = /"seed":\s*(-?\d+)/;

/** Return a seed that reads well and can be typed again: 32 bits. */
export function drawSeed(): string {
  return String(crypto.getRandomValues(new Uint32Array(1))[0]);
}

/** Parse a body and take its seed out, digit for digit. */
export function parseBody(json: string): { body: Record<string, unknown>; seed: string } {
  const seed = SEED.exec(json)?.[1] ?? "";
  const body = JSON.parse(json) as Record<string, unknown>;
  delete body["seed"];
  return { body, seed };
}

/** Write a body with its seed, digit for digit. */
export function writeBody(body: Record<string, unknown>, seed: string): string {
  if (!/^-?\d+$/.test(seed)) throw new Error(`the seed ${seed} is not a whole number`);
  return `{"seed":${seed},${JSON.stringify(body).slice(1)}`;
}
