// What a canvas looked like after every step, kept small enough for thousands of them.
import type { CanvasField } from "../api/types";
import { Observable } from "../observable";

export type CellState = "pinned" | "open" | "decided";

/** One position; cells never change, a new one takes the place of the old. */
export interface Cell {
  readonly text: string;
  readonly state: CellState;
  readonly confidence: number;
  /** What the step that made this cell did to the position. */
  readonly change: "settled" | "edited" | "reopened" | null;
}

// From the nearest of these on, steps are applied again; a cell is shared by all that show it.
const KEYFRAME_STEPS = 64;
const UNKNOWN: Cell = { text: "", state: "open", confidence: 0, change: null };

export class Recording extends Observable {
  #frames: CanvasField[] = [];
  #keyframes: Cell[][];
  #cells: Cell[];
  #at = 0;
  isComplete = false;

  constructor(pins: (string | null)[] = []) {
    super();
    const first = pins.map((text) => (text === null ? UNKNOWN : pinned(text)));
    this.#keyframes = [first];
    this.#cells = first;
  }

  get numSteps(): number {
    return this.#frames.length;
  }

  push(frame: CanvasField): void {
    this.#frames.push(frame);
    this.changed();
  }

  end(): void {
    this.isComplete = true;
    this.changed();
  }

  /** Return all cells after so many steps; the same array for the same step. */
  seek(step: number): readonly Cell[] {
    const target = Math.min(Math.max(step, 0), this.#frames.length);
    if (target < this.#at || target - this.#at > KEYFRAME_STEPS) this.#jump(target);
    while (this.#at < target) this.#advance();
    return this.#cells;
  }

  #jump(target: number): void {
    const nearest = Math.min(Math.floor(target / KEYFRAME_STEPS), this.#keyframes.length - 1);
    if (target < this.#at || nearest * KEYFRAME_STEPS > this.#at) {
      this.#cells = this.#keyframes[nearest]!;
      this.#at = nearest * KEYFRAME_STEPS;
    }
  }

  #advance(): void {
    this.#cells = applied(this.#cells, this.#frames[this.#at]!);
    this.#at += 1;
    const number = this.#at / KEYFRAME_STEPS;
    if (number === this.#keyframes.length) this.#keyframes.push(this.#cells);
  }
}

function pinned(text: string): Cell {
  return { text, state: "pinned", confidence: 1, change: null };
}

/** Return the cells after a frame; those that look the same stay the same objects. */
function applied(before: readonly Cell[], frame: CanvasField): Cell[] {
  const cells = before.map((cell) => (cell.change === null ? cell : { ...cell, change: null }));
  while (cells.length < frame.start) cells.push(UNKNOWN);
  frame.tokens.forEach((text, offset) => {
    const position = frame.start + offset;
    const old = cells[position] ?? UNKNOWN;
    if (old.state === "pinned") return;
    const isOpen = frame.undecided[offset] ?? false;
    const confidence = isOpen || old.state === "open" ? frame.confidence[offset] ?? 0 : old.confidence;
    cells[position] = changedCell(old, text, isOpen, confidence);
  });
  return cells;
}

function changedCell(old: Cell, text: string, isOpen: boolean, confidence: number): Cell {
  if (isOpen) {
    const change = old.state === "decided" ? "reopened" : null;
    return { text, state: "open", confidence, change };
  }
  if (old.state === "open") return { text, state: "decided", confidence, change: "settled" };
  return old.text === text ? old : { text, state: "decided", confidence, change: "edited" };
}
