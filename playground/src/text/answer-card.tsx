// One answer: its text as it is committed, beside it the canvas, below both the figures.
import { useRef } from "preact/hooks";
import { Canvas } from "../canvas/canvas";
import { visible } from "../canvas/visible";
import { useFollow } from "../follow";
import { useObserved } from "../observable";
import type { Answer } from "./answer";
import { Figures } from "./figures";

const ENDS: Record<string, string> = { stop: "ended by itself", length: "cut at max tokens" };

interface Props {
  answer: Answer;
  rate: () => number;
}

export function AnswerCard({ answer, rate }: Props) {
  useObserved(answer);
  const text = useRef<HTMLDivElement>(null);
  useFollow(text);
  const end = answer.finishReason === null ? "" : (ENDS[answer.finishReason] ?? answer.finishReason);
  return (
    <article class="answer" aria-busy={answer.isRunning} data-answer={answer.name}>
      <header>
        <strong>{answer.name}</strong>
        <span class="tag">{answer.algorithm}</span>
        <span class="hint">{answer.isRunning ? "denoising…" : end}</span>
      </header>
      <div class="answer-body">
        <div class="answer-text" dir="auto" ref={text}>
          {visible(answer.text)}
          {answer.isRunning && <span class="caret" aria-hidden="true" />}
          {answer.failure !== null && <p class="failure">{visible(answer.failure)}</p>}
        </div>
        <Canvas recording={answer.recording} rate={rate} name={answer.name} />
      </div>
      <Figures answer={answer} />
    </article>
  );
}
