// Bundles the page into the folder that is given: `node build.mjs ../src/sfumato/serve/playground/static`.
// The same sources and the versions of package-lock.json give the same bytes.
import { build } from "esbuild";
import { cp, mkdir, readdir, rm } from "node:fs/promises";
import { join } from "node:path";

const target = process.argv[2];
if (!target) throw new Error("say where the bundle is to lie");

await mkdir(target, { recursive: true });
for (const name of await readdir(target)) await rm(join(target, name), { recursive: true });

await build({
  entryPoints: [
    { in: "src/main.tsx", out: "playground" },
    { in: "src/styles/index.css", out: "playground" },
  ],
  outdir: target,
  bundle: true,
  minify: true,
  format: "esm",
  target: ["es2022"],
  charset: "utf8",
  // Licence comments of what is bundled stay at the end of the file.
  legalComments: "eof",
  banner: { js: "/*! Bundled with Preact, MIT License, Copyright (c) 2015-present Jason Miller. */" },
  jsx: "automatic",
  jsxImportSource: "preact",
  loader: { ".woff2": "copy" },
  assetNames: "[name]",
});
await cp("src/index.html", join(target, "index.html"));
await cp("src/icon.svg", join(target, "icon.svg"));
for (const font of ["inter", "jetbrains-mono"]) {
  await cp(`node_modules/@fontsource-variable/${font}/LICENSE`, join(target, `${font}-LICENSE.txt`));
}
await cp("node_modules/preact/LICENSE", join(target, "preact-LICENSE.txt"));
