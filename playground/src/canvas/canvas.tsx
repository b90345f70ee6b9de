// A canvas with its scrubber: follows what is denoised now, and replays any step of what was.
import { useEffect, useMemo } from "preact/hooks";
import { useObserved } from "../observable";
import { Cells } from "./cells";
import { Player } from "./player";
import type { Cell, Recording } from "./recording";

interface Props {
  recording: Recording;
  rate: () => number;
  name: string;
}

function described(cells: readonly Cell[], step: number, total: number): string {
  const open = cells.filter((cell) => cell.state === "open").length;
  return `Canvas after step ${step} of ${total}: ${cells.length - open} positions stand, ${open} are open`;
}

export function Canvas({ recording, rate, name }: Props) {
  const player = useMemo(() => new Player(recording, rate), [recording]);
  useEffect(() => () => player.close(), [player]);
  useObserved(player);
  const cells = recording.seek(player.at);
  const total = recording.numSteps;
  const label = described(cells, player.at, total);
  return (
    <figure class="canvas-figure" data-step={player.at} data-steps={total}>
      <Cells cells={cells} label={label} />
      <figcaption class="scrubber">
        <PlayButton player={player} />
        <input
          type="range"
          min={0}
          max={total}
          value={player.at}
          disabled={total === 0}
          aria-label={`Step of ${name}`}
          aria-valuetext={label}
          onInput={(event) => player.hold(Number(event.currentTarget.value))}
        />
        <output>
          step {player.at} / {total}
        </output>
      </figcaption>
    </figure>
  );
}

function PlayButton({ player }: { player: Player }) {
  const isMoving = player.isPlaying && !player.isAtEnd;
  const toggle = () => (isMoving ? player.hold(player.at) : player.play());
  return (
    <button
      type="button"
      class="icon-button"
      aria-label={isMoving ? "Pause" : "Play from here"}
      disabled={player.recording.numSteps === 0}
      onClick={toggle}
    >
      <svg viewBox="0 0 16 16" aria-hidden="true">
        <path d={isMoving ? "M4 3h3v10H4zM9 3h3v10H9z" : "M4 2.5v11l9-5.5z"} />
      </svg>
    </button>
  );
}
