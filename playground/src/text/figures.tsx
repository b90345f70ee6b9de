// What an answer cost, in numbers.
import type { Answer } from "./answer";

function seconds(value: number | null): string {
  if (value === null) return "–";
  return value < 1 ? `${Math.round(value * 1000)} ms` : `${value.toFixed(2)} s`;
}

function figuresOf(answer: Answer): [string, string, string][] {
  const usage = answer.usage;
  const tokens = usage?.completion_tokens;
  return [
    ["NFE", usage ? String(usage.nfe) : "–", "forwards that the answer had a row in"],
    ["TPF", usage ? usage.tokens_per_forward.toFixed(2) : "–", "tokens per forward"],
    ["tokens/s", tokens ? Math.round(tokens / answer.seconds).toString() : "–", "tokens over the whole time"],
    ["first text", seconds(answer.firstTextSeconds), "from sending to the first committed text"],
    ["tokens", tokens === undefined ? "–" : String(tokens), "tokens of the answer"],
    ["time", answer.isRunning ? "…" : seconds(answer.seconds), "from sending to the end"],
    ["seed", answer.seed, "the same seed gives the same answer"],
  ];
}

export function Figures({ answer }: { answer: Answer }) {
  return (
    <dl class="figures">
      {figuresOf(answer).map(([name, value, meaning]) => (
        <div key={name} title={meaning}>
          <dt>{name}</dt>
          <dd data-figure={name}>{value}</dd>
        </div>
      ))}
    </dl>
  );
}
