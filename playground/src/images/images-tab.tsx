// Images: several at once, each with its previews, bar and cancel; a gallery that repeats a picture.
import { useState } from "preact/hooks";
import { drawSeed, parseBody } from "../api/seeds";
import type { ImageModel } from "../api/types";
import { Fold } from "../controls/fold";
import { ModelChoice } from "../controls/choice";
import { Field } from "../controls/field";
import { fieldsOf, type Values } from "../controls/values";
import { Observable, useObserved } from "../observable";
import { Drawing } from "./drawing";
import { Picture } from "./picture";
import { requestOf } from "./png";

/** All pictures of this tab, the newest first. */
class Gallery extends Observable {
  drawings: Drawing[] = [];
  problem: string | null = null;

  draw(body: Record<string, unknown>, seed: string): void {
    const drawing = new Drawing(body, seed);
    this.drawings = [drawing, ...this.drawings];
    this.problem = null;
    void drawing.run();
    this.changed();
  }

  remove(drawing: Drawing): void {
    drawing.cancel();
    drawing.forget();
    this.drawings = this.drawings.filter((each) => each !== drawing);
    this.changed();
  }

  /** Draw what a file of ours shows once more. */
  async repeatFile(file: File): Promise<void> {
    const json = requestOf(new Uint8Array(await file.arrayBuffer()));
    if (json === null) {
      this.problem = `${file.name} carries no request of Sfumato's`;
      this.changed();
      return;
    }
    const { body, seed } = parseBody(json);
    this.draw(body, seed);
  }
}

const FIRST_PROMPT = "a red circle above a green square";

export function ImagesTab({ models }: { models: readonly ImageModel[] }) {
  const [gallery] = useState(() => new Gallery());
  useObserved(gallery);
  const [modelId, setModelId] = useState(models[0]?.id ?? "");
  const [prompt, setPrompt] = useState(FIRST_PROMPT);
  const [values, setValues] = useState<Values>({});
  const model = models.find((each) => each.id === modelId);
  if (!model) return <p class="notice">No model that draws is served here.</p>;

  function submit(event: Event) {
    event.preventDefault();
    const asked = model!.num_classes > 0 ? { class_labels: [Number(prompt) || 0] } : { prompt };
    const body = { model: modelId, ...asked, ...fieldsOf(model!.controls, values) };
    gallery.draw(body, values["seed"] || drawSeed());
  }

  function take({ body, seed }: { body: Record<string, unknown>; seed: string }) {
    setPrompt(String(body["prompt"] ?? body["class_labels"] ?? ""));
    setValues({ ...valuesOf(model!, body), seed });
  }

  return (
    <div class="bench">
      <aside class="panel" aria-label="Settings">
        <Fold title="Settings">
          <ModelChoice models={models} value={modelId} onValue={setModelId} />
          {model.controls.map((control) => (
            <Field
              key={control.name}
              control={control}
              value={values[control.name] ?? ""}
              onValue={(value) => setValues({ ...values, [control.name]: value })}
            />
          ))}
        </Fold>
      </aside>
      <section class="work" aria-label="Pictures">
        <form class="composer-row" onSubmit={submit}>
          <textarea
            name="prompt"
            rows={2}
            aria-label={model.num_classes > 0 ? "Class number" : "Prompt"}
            value={prompt}
            onInput={(event) => setPrompt(event.currentTarget.value)}
            onKeyDown={(event) => {
              if (event.key === "Enter" && !event.shiftKey && !event.isComposing) submit(event);
            }}
          />
          <button type="submit" class="primary" disabled={model.has_text && prompt.trim() === ""}>
            Draw
          </button>
        </form>
        <RepeatFile onFile={(file) => void gallery.repeatFile(file)} />
        {gallery.problem !== null && <p class="failure">{gallery.problem}</p>}
        <ul class="gallery">
          {gallery.drawings.map((drawing) => (
            <Picture
              key={drawing}
              drawing={drawing}
              onRepeat={(recorded) => gallery.draw(recorded.body, recorded.seed)}
              onTake={take}
              onRemove={() => gallery.remove(drawing)}
            />
          ))}
        </ul>
        {gallery.drawings.length === 0 && (
          <p class="hint">Press Draw more than once: the pictures are denoised together.</p>
        )}
      </section>
    </div>
  );
}

function RepeatFile({ onFile }: { onFile: (file: File) => void }) {
  return (
    <label class="file">
      Repeat a picture from its file
      <input
        type="file"
        accept="image/png"
        onChange={(event) => {
          const [file] = event.currentTarget.files ?? [];
          if (file) onFile(file);
          event.currentTarget.value = "";
        }}
      />
    </label>
  );
}

/** Return a request's fields as the form shows them; a scheduler is known by its name. */
function valuesOf(model: ImageModel, body: Record<string, unknown>): Values {
  const values: Record<string, string> = {};
  for (const { name } of model.controls) {
    const value = body[name];
    if (value === undefined || value === null) continue;
    const isNamed = typeof value === "object" && "name" in value;
    values[name] = String(isNamed ? value.name : value);
  }
  return values;
}
