// A text whose gaps denoise, and what was tried for their lengths.
import { Canvas } from "../canvas/canvas";
import { visible } from "../canvas/visible";
import { useObserved } from "../observable";
import type { Filling, Tried } from "./filling";

interface Props {
  filling: Filling;
  rate: () => number;
}

export function FilledText({ filling, rate }: Props) {
  useObserved(filling);
  const shown = filling.tried[filling.shown];
  return (
    <article class="answer" aria-busy={filling.isRunning} data-answer="infill">
      <header>
        <strong>Filled text</strong>
        <span class="tag">{filling.settings.algorithm || filling.model.default_algorithm}</span>
        {filling.isRunning && (
          <button type="button" onClick={() => filling.stop()}>
            Stop
          </button>
        )}
      </header>
      {filling.text !== null && (
        <div class="answer-text" dir="auto">
          {visible(filling.text)}
        </div>
      )}
      {filling.failure !== null && <p class="failure">{visible(filling.failure)}</p>}
      {shown && <Canvas key={shown.index} recording={shown.recording} rate={rate} name="the filled text" />}
      {filling.tried.length > 1 && <Lengths filling={filling} />}
      <dl class="figures">
        <div>
          <dt>NFE</dt>
          <dd data-figure="NFE">{filling.usage?.nfe ?? "–"}</dd>
        </div>
        <div>
          <dt>TPF</dt>
          <dd>{filling.usage?.tokens_per_forward.toFixed(2) ?? "–"}</dd>
        </div>
        <div>
          <dt>seed</dt>
          <dd>{filling.seed}</dd>
        </div>
      </dl>
    </article>
  );
}

function Lengths({ filling }: { filling: Filling }) {
  return (
    <div class="lengths" role="group" aria-label="Lengths that were tried, the most likely one is taken">
      {filling.tried.map((each, at) => (
        <button
          type="button"
          key={each.index}
          class={each.isChosen ? "chip chosen" : "chip"}
          aria-pressed={at === filling.shown}
          onClick={() => filling.show(at)}
        >
          {each.lengths.join(" · ")} <small>{likelihood(each)}</small>
        </button>
      ))}
    </div>
  );
}

function likelihood(tried: Tried): string {
  const score = tried.meanLogprob === null ? "…" : tried.meanLogprob.toFixed(3);
  return tried.isChosen ? `${score} taken` : score;
}
