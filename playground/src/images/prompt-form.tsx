// Where a picture is asked for: by a prompt or a class, or by the file of one that was drawn before.
import type { ImageModel } from "../api/types";

interface Props {
  model: ImageModel;
  prompt: string;
  onPrompt: (prompt: string) => void;
  onDraw: () => void;
}

export function PromptForm({ model, prompt, onPrompt, onDraw }: Props) {
  const isMissing = model.has_text && prompt.trim() === "";

  function draw(event: Event) {
    event.preventDefault();
    if (!isMissing) onDraw();
  }

  return (
    <form class="composer-row" onSubmit={draw}>
      <textarea
        name="prompt"
        rows={2}
        aria-label={model.num_classes > 0 ? "Class number" : "Prompt"}
        value={prompt}
        onInput={(event) => onPrompt(event.currentTarget.value)}
        onKeyDown={(event) => {
          if (event.key === "Enter" && !event.shiftKey && !event.isComposing) draw(event);
        }}
      />
      <button type="submit" class="primary" disabled={isMissing}>
        Draw
      </button>
    </form>
  );
}

export function RepeatFile({ onFile }: { onFile: (file: File) => void }) {
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
