// Login in one round trip with @xmpp/client (SASL2, Bind 2, stream management, FAST): once with the password, which brings a
// token, then with that token and a password that is wrong. Usage, beside client.mjs and its libraries, with an account alice:
//     NODE_EXTRA_CA_CERTS=data/certificate.pem node login.mjs xmpp://localhost:5222|wss://localhost:5443/ws alice secret
// Ends with status 1 and a word if something is not as it should.

import assert from "node:assert/strict";
import { client, xml } from "@xmpp/client";
import WebSocket from "ws";

const [service, username, right] = process.argv.slice(2);
globalThis.WebSocket = WebSocket;
const WITHIN_MS = 25_000;
let token = null;

async function login(password, mechanism) {
  const userAgent = xml("user-agent", { id: "d4565fa7-4d72-4749-b3d3-740edbf87770" });
  const xmpp = client({ service, domain: "localhost", username, password, resource: "js", userAgent });
  xmpp.on("error", (error) => console.error(String(error)));
  Object.assign(xmpp.fast, {
    saveToken: async (given) => { token = given; },
    fetchToken: async () => token,
    deleteToken: async () => { token = null; },
  });
  const sent = [];
  xmpp.on("send", (element) => sent.push(element));
  const jid = String(await xmpp.start());
  const authentications = sent.filter((element) => element.is("authenticate", "urn:xmpp:sasl:2"));
  assert.deepEqual(authentications.map((element) => element.attrs.mechanism), [mechanism]);
  assert.ok(!sent.some((element) => element.is("iq") || element.is("enable")), "binding and enabling came along");
  assert.ok(xmpp.streamManagement.enabled);
  const heard = new Promise((resolve) => xmpp.on("stanza", (stanza) => stanza.is("message") && resolve(stanza.getChildText("body"))));
  await xmpp.send(xml("presence"));
  await xmpp.send(xml("message", { to: jid, type: "chat" }, xml("body", {}, mechanism)));
  assert.equal(await heard, mechanism);
  await xmpp.stop();
  return jid;
}

setTimeout(() => { console.error(`not done within ${WITHIN_MS} ms`); process.exit(1); }, WITHIN_MS).unref();
const first = await login(right, "SCRAM-SHA-1");
assert.ok(token, "a token was given");
const second = await login(`not ${right}`, "HT-SHA-256-NONE");
assert.equal(second, first, "the same client has the same resource");
console.log(`ok: ${first} with the password, then with the token`);
