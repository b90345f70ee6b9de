// How fast canvases are shown.
import { useRef, useState } from "preact/hooks";

/** Steps per second that an eye can follow; Infinity shows each step as it comes. */
export const PACES: readonly { name: string; rate: number }[] = [
  { name: "4 steps a second", rate: 4 },
  { name: "10 steps a second", rate: 10 },
  { name: "30 steps a second", rate: 30 },
  { name: "as it comes", rate: Infinity },
];

export interface Pace {
  index: number;
  choose: (index: number) => void;
  /** Always the rate that is chosen now. */
  rate: () => number;
}

export function usePace(first: number): Pace {
  const [index, choose] = useState(first);
  const chosen = useRef(index);
  chosen.current = index;
  const [rate] = useState(() => () => PACES[chosen.current]?.rate ?? Infinity);
  return { index, choose, rate };
}
