// Engine view: each model's loop, live.
import { useEffect, useState } from "preact/hooks";
import { key } from "../api/client";
import type { Model, Step } from "../api/types";
import { useObserved } from "../observable";
import { Chart, shortName } from "./chart";
import { ModelMonitor, Monitor } from "./monitor";

const KINDS = ["prefill", "denoise", "commit", "score", "encode", "decode"];

export function EngineTab({ models, isShown }: { models: readonly Model[]; isShown: boolean }) {
  const [monitor] = useState(() => new Monitor());
  useObserved(monitor);
  const { value } = useObserved(key);
  useEffect(() => {
    if (!isShown) return;
    const leaving = new AbortController();
    void monitor.watch(leaving.signal);
    return () => leaving.abort();
  }, [monitor, isShown, value]);
  return (
    <section class="engine" aria-label="Engine">
      <p class="lead">
        One turn of the loop is one column: every request that can run has a row in it, and all rows share one
        forward. Requests join and leave between any two columns.
      </p>
      <Legend />
      {monitor.problem !== null && <p class="notice">{monitor.problem}; trying again.</p>}
      {models.map((model) => (
        <ModelLoop key={model.id} name={model.id} monitor={monitor.models.get(model.id) ?? null} />
      ))}
    </section>
  );
}

function Legend() {
  return (
    <ul class="legend" aria-label="Colours">
      {KINDS.map((kind) => (
        <li key={kind}>
          <span class={`swatch row-${kind}`} aria-hidden="true" /> {kind}
        </li>
      ))}
      <li>
        <span class="swatch time-device" aria-hidden="true" /> device time
      </li>
      <li>
        <span class="swatch time-host" aria-hidden="true" /> host time
      </li>
    </ul>
  );
}

function milliseconds(seconds: number): string {
  return `${(seconds * 1000).toFixed(1)} ms`;
}

function mean(steps: readonly Step[], name: "device_seconds" | "host_seconds"): string {
  if (steps.length === 0) return "–";
  return milliseconds(steps.reduce((sum, step) => sum + step[name], 0) / steps.length);
}

function told(step: Step): string {
  const parts = step.shares.map((share) => {
    const tokens = share.tokens > 0 ? `, ${share.tokens} tokens` : "";
    const rows = share.rows > 1 ? `${share.rows} rows of ` : "";
    return `${rows}${shortName(share.request_id)} ${share.kind}${tokens}`;
  });
  const times = `device ${milliseconds(step.device_seconds)}, host ${milliseconds(step.host_seconds)}`;
  return `launch ${step.launch_id} (${step.kind}), ${times}: ${parts.join("; ")}`;
}

function ModelLoop({ name, monitor }: { name: string; monitor: ModelMonitor | null }) {
  const shown = monitor ?? new ModelMonitor();
  const { steps, gauges } = shown;
  const rates = shown.rates();
  const last = steps.at(-1);
  return (
    <article class="loop" data-model={name} data-steps={shown.numSteps}>
      <header>
        <strong>{name}</strong>
        {shown.isGone && <span class="failure">the engine is gone</span>}
      </header>
      <dl class="figures">
        <Figure name="running" value={gauges?.running} />
        <Figure name="waiting" value={gauges?.waiting} />
        <Figure name="steps/s" value={Math.round(rates.steps)} />
        <Figure name="tokens fed/s" value={Math.round(rates.tokens)} />
        <Figure name="device" value={mean(steps, "device_seconds")} />
        <Figure name="host" value={mean(steps, "host_seconds")} />
        <Figure name="retractions" value={gauges?.retractions} />
      </dl>
      <Pages monitor={shown} />
      <Chart steps={steps} label={`The last ${steps.length} steps of ${name}`} />
      <p class="hint last-step">{last ? told(last) : "No step yet: ask something in another tab."}</p>
    </article>
  );
}

function Figure({ name, value }: { name: string; value: number | string | undefined }) {
  return (
    <div>
      <dt>{name}</dt>
      <dd data-figure={name}>{value ?? "–"}</dd>
    </div>
  );
}

function Pages({ monitor: { gauges } }: { monitor: ModelMonitor }) {
  if (gauges === null) return null;
  const { pages_leased: leased, pages_cached: cached, pages_free: free } = gauges;
  const total = leased + cached + free;
  if (total === 0) return <p class="hint">This model keeps no pages of keys and values.</p>;
  const label = `Pages: ${leased} leased, ${cached} cached, ${free} free`;
  return (
    <div class="pages">
      <div class="pages-bar" role="img" aria-label={label}>
        <span class="leased" style={{ flexGrow: leased }} />
        <span class="cached" style={{ flexGrow: cached }} />
        <span class="free" style={{ flexGrow: free }} />
      </div>
      <p class="hint">{label}</p>
    </div>
  );
}
