// The canvas: every position a cell, in lines of as many positions as are numbered together.
import { Component } from "preact";
import { useRef } from "preact/hooks";
import { useFollow } from "../follow";
import { cellText, isMarker } from "./visible";
import type { Cell } from "./recording";

const LINE_CELLS = 16;
const CONFIDENCE_CLASSES = 10;

function cellClass(cell: Cell): string {
  const level = Math.min(CONFIDENCE_CLASSES - 1, Math.floor(cell.confidence * CONFIDENCE_CLASSES));
  const marker = isMarker(cell.text) ? " marker" : "";
  const change = cell.change === null ? "" : ` ${cell.change}`;
  return `cell ${cell.state} c${level}${marker}${change}`;
}

function title(cell: Cell, position: number): string {
  if (cell.state === "pinned") return `position ${position}: given`;
  const verb = cell.state === "open" ? "best guess" : "decided";
  return `position ${position}: ${verb}, confidence ${cell.confidence.toFixed(2)}`;
}

interface LineProps {
  cells: readonly Cell[];
  start: number;
}

/** One line; it is drawn again only if one of its cells is another one. */
class Line extends Component<LineProps> {
  override shouldComponentUpdate(next: LineProps): boolean {
    if (next.start !== this.props.start) return true;
    const old = this.props.cells;
    return next.cells.length !== old.length || next.cells.some((cell, index) => cell !== old[index]);
  }

  override render({ cells, start }: LineProps) {
    return (
      <div class="line">
        <span class="gutter" aria-hidden="true">
          {start}
        </span>
        <span class="cells">
          {cells.map((cell, offset) => (
            <span key={offset} class={cellClass(cell)} title={title(cell, start + offset)}>
              {cellText(cell.text) || "\u00a0"}
            </span>
          ))}
        </span>
      </div>
    );
  }
}

export function Cells({ cells, label }: { cells: readonly Cell[]; label: string }) {
  const canvas = useRef<HTMLDivElement>(null);
  useFollow(canvas);
  const lines = [];
  for (let start = 0; start < cells.length; start += LINE_CELLS) {
    lines.push(<Line key={start} start={start} cells={cells.slice(start, start + LINE_CELLS)} />);
  }
  return (
    <div class="canvas" ref={canvas} role="img" aria-label={label} tabIndex={0}>
      {lines.length > 0 ? lines : <p class="hint">Nothing is denoised yet.</p>}
    </div>
  );
}

const LEGEND: readonly [string, string][] = [
  ["cell open c1", "unsure guess"],
  ["cell open c9", "sure guess"],
  ["cell decided c9", "decided"],
  ["cell pinned", "given"],
];

/** What the cells' looks mean. */
export function CellLegend() {
  return (
    <ul class="cell-legend" aria-label="What the cells mean">
      {LEGEND.map(([look, meaning]) => (
        <li key={meaning}>
          <span class={look} aria-hidden="true">
            ab
          </span>
          {meaning}
        </li>
      ))}
    </ul>
  );
}
