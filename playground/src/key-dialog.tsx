// Asks for the API key where the server wants one; it stays in this tab.
import { useEffect, useRef, useState } from "preact/hooks";
import { key } from "./api/client";
import { useObserved } from "./observable";

export function KeyDialog() {
  useObserved(key);
  const [text, setText] = useState("");
  const dialog = useRef<HTMLDialogElement>(null);
  const isWanted = key.wanted !== null;
  useEffect(() => {
    if (isWanted) dialog.current?.showModal();
    else dialog.current?.close();
  }, [isWanted]);

  function give(event: Event) {
    event.preventDefault();
    key.give(text.trim());
    setText("");
  }

  return (
    <dialog
      ref={dialog}
      class="key-dialog"
      aria-labelledby="key-title"
      onCancel={(event) => event.preventDefault()}
    >
      <form onSubmit={give}>
        <h2 id="key-title">API key</h2>
        <p role="alert">{key.wanted}</p>
        <label class="field">
          <span>key</span>
          <input
            name="api-key"
            type="password"
            autocomplete="off"
            value={text}
            onInput={(event) => setText(event.currentTarget.value)}
          />
          <small>It is kept in this browser tab only, and sent to this server only.</small>
        </label>
        <button type="submit" class="primary" disabled={text.trim() === ""}>
          Use this key
        </button>
      </form>
    </dialog>
  );
}
