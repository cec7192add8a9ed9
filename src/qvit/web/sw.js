// Keeps the site on the device, and isolates its pages from other origins: from the second visit on they may have
// several threads, on any server. qvit web puts before this what files it has (FILES), and the caches of this site: how
// their names begin (SITE), and the one of this version (CACHE). The page says which vectors its browser has.
const VECTORS = location.search.slice(1);
const KEPT = [...FILES, `${VECTORS}.wasm`, `${VECTORS}-threads.wasm`];

self.addEventListener("install", (event) => {
  event.waitUntil(
    (async () => {
      const cache = await caches.open(CACHE);
      for (const file of KEPT) if ((await cache.match(file)) === undefined) await cache.add(file);
      await self.skipWaiting();
    })(),
  );
});

self.addEventListener("activate", (event) => {
  event.waitUntil(
    (async () => {
      for (const name of await caches.keys()) if (name.startsWith(SITE) && name !== CACHE) await caches.delete(name);
      await self.clients.claim();
    })(),
  );
});

function isolated(response) {
  if (response.status === 0) return response; // leads elsewhere
  const { status, statusText } = response;
  const headers = new Headers(response.headers);
  headers.set("Cross-Origin-Opener-Policy", "same-origin");
  headers.set("Cross-Origin-Embedder-Policy", "require-corp");
  return new Response(response.body, { status, statusText, headers });
}

self.addEventListener("fetch", (event) => {
  const { request } = event;
  if (request.method !== "GET" || new URL(request.url).origin !== location.origin) return;
  event.respondWith(
    (async () => {
      const cache = await caches.open(CACHE);
      return isolated((await cache.match(request, { ignoreSearch: true })) ?? (await fetch(request)));
    })(),
  );
});
