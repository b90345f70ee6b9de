// The loop, drawn: a column for each step, a lane for each request, and below how long the step took.
import { useEffect, useRef, useState } from "preact/hooks";
import type { Step } from "../api/types";

const COLUMN = 10;
const LANE = 16;
const MAX_LANES = 12;
const TIME_HEIGHT = 72;
const GAP = 12;
const NAMES = 118;
// Below this the names of requests would take a third of the place.
const NARROW = 480;

/** Return the requests of the steps in the order of their first row; the newest ones if there are too many. */
function lanesOf(steps: readonly Step[]): string[] {
  const ids = new Set(steps.flatMap((step) => step.shares.map((share) => share.request_id)));
  return [...ids].slice(-MAX_LANES);
}

export function shortName(requestId: string): string {
  const [, kind, rest] = /^([a-z]+)[-_](.*)$/.exec(requestId) ?? [];
  return kind && rest ? `${kind} …${rest.slice(-7)}` : requestId;
}

export function Chart({ steps, label }: { steps: readonly Step[]; label: string }) {
  const box = useRef<HTMLDivElement>(null);
  const width = useWidth(box);
  return (
    <div class="chart">
      <div ref={box}>{width > 0 && <Drawn steps={steps} label={label} width={width} />}</div>
    </div>
  );
}

/** Return how wide an element is, whenever that changes. */
function useWidth(element: { current: HTMLElement | null }): number {
  const [width, setWidth] = useState(0);
  useEffect(() => {
    const observer = new ResizeObserver(([entry]) => setWidth(Math.floor(entry?.contentRect.width ?? 0)));
    if (element.current) observer.observe(element.current);
    return () => observer.disconnect();
  }, [element]);
  return width;
}

function Drawn({ steps, label, width }: { steps: readonly Step[]; label: string; width: number }) {
  const names = width < NARROW ? 0 : NAMES;
  const shown = steps.slice(-Math.floor((width - names) / COLUMN));
  const lanes = lanesOf(shown);
  const lanesHeight = Math.max(1, lanes.length) * LANE;
  const height = lanesHeight + GAP + TIME_HEIGHT;
  const slowest = Math.max(0.001, ...shown.map((step) => step.device_seconds + step.host_seconds));
  return (
    <svg width={width} height={height} role="img" aria-label={label}>
      {lanes.map((id, lane) => (
        <g key={id} transform={`translate(0 ${lane * LANE})`}>
          {names > 0 && (
            <text class="lane-name" y={LANE - 5}>
              {shortName(id)}
            </text>
          )}
          <line class="lane" x1={names} x2={width} y1={LANE - 0.5} y2={LANE - 0.5} />
        </g>
      ))}
      {names > 0 && (
        <text class="lane-name" y={lanesHeight + GAP + 9}>
          {(slowest * 1000).toFixed(1)} ms
        </text>
      )}
      {shown.map((step, index) => (
        // The newest step stands at the right edge.
        <g key={index} transform={`translate(${width - (shown.length - index) * COLUMN} 0)`}>
          <Rows step={step} lanes={lanes} />
          <Times step={step} base={height} slowest={slowest} />
        </g>
      ))}
    </svg>
  );
}

function Rows({ step, lanes }: { step: Step; lanes: readonly string[] }) {
  const seen = new Set<string>();
  return step.shares.map(({ request_id: id, kind }) => {
    const lane = lanes.indexOf(id);
    if (lane < 0) return null;
    // A second kind of the same request in the same step, such as a commit that rides, is drawn inside.
    const inset = seen.has(id) ? 3 : 0;
    seen.add(id);
    return (
      <rect
        key={`${id}.${kind}`}
        class={`row-${kind}`}
        x={1 + inset}
        y={lane * LANE + 3 + inset}
        width={COLUMN - 2 - 2 * inset}
        height={LANE - 6 - 2 * inset}
        rx={2}
      />
    );
  });
}

function Times({ step, base, slowest }: { step: Step; base: number; slowest: number }) {
  const device = (step.device_seconds / slowest) * TIME_HEIGHT;
  const host = (step.host_seconds / slowest) * TIME_HEIGHT;
  return (
    <>
      <rect class="time-device" x={1} y={base - device} width={COLUMN - 2} height={device} />
      <rect class="time-host" x={1} y={base - device - host} width={COLUMN - 2} height={host} />
    </>
  );
}
