// The way gaps are written: [[4]] is a gap of four tokens, [[2-6]] one of two to six.

export type Part = string | { length: number | [number, number] };

const GAP = /\[\[\s*(\d{1,4})\s*(?:-\s*(\d{1,4})\s*)?\]\]/g;

/** Return the parts of a text with gaps. */
export function partsOf(text: string): Part[] {
  const parts: Part[] = [];
  let end = 0;
  for (const found of text.matchAll(GAP)) {
    if (found.index > end) parts.push(text.slice(end, found.index));
    const shortest = Number(found[1]);
    parts.push({ length: found[2] === undefined ? shortest : [shortest, Number(found[2])] });
    end = found.index + found[0].length;
  }
  if (end < text.length) parts.push(text.slice(end));
  return parts;
}

/** Return how many combinations of lengths there are; 0 without a gap or with a range that runs back. */
export function combinations(parts: readonly Part[]): number {
  const gaps = parts.filter((part) => typeof part !== "string");
  if (gaps.length === 0) return 0;
  return gaps.reduce((product, { length }) => {
    const width = typeof length === "number" ? Number(length > 0) : length[1] - length[0] + 1;
    return product * Math.max(0, width);
  }, 1);
}

/** Write a gap. */
export function gapText(shortest: number, longest: number): string {
  return shortest === longest ? `[[${shortest}]]` : `[[${shortest}-${longest}]]`;
}
