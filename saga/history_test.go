package saga

import (
	"encoding/json"
	"testing"
	"time"

	jsonv1 "github.com/go-json-experiment/json/v1"
	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/deed-go/deed/eventstore"
)

// TestEncodePayload: the fast form is the same, byte for byte.
func TestEncodePayload(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		text := rapid.OneOf(rapid.StringMatching(`[a-z]{0,5}`), rapid.String())
		moment := rapid.Custom(func(t *rapid.T) time.Time {
			at := time.Unix(rapid.Int64Range(-1e11, 3e11).Draw(t, "seconds"), rapid.Int64Range(0, 1e9-1).Draw(t, "nanoseconds")).UTC()
			if rapid.Bool().Draw(t, "zone") {
				at = at.In(time.FixedZone("", 3600))
			}
			return at
		})
		raw := rapid.Custom(func(t *rapid.T) json.RawMessage {
			data, err := jsonv1.Marshal(map[string]string{text.Draw(t, "key"): text.Draw(t, "value")})
			if err != nil {
				t.Skip(err)
			}
			return data
		})
		var p payload
		p.Format = rapid.IntRange(-1, 2).Draw(t, "format")
		if rapid.Bool().Draw(t, "step") {
			p.Step = &stepID{Kind: text.Draw(t, "kind"), Name: text.Draw(t, "name"), Occurrence: rapid.IntRange(0, 3).Draw(t, "occurrence"), In: text.Draw(t, "in")}
		}
		if rapid.Bool().Draw(t, "input") {
			p.In = raw.Draw(t, "in")
		}
		p.Since = eventstore.Position(rapid.Uint64().Draw(t, "since"))
		if rapid.Bool().Draw(t, "trigger") {
			p.Trigger = &origin{
				ID: text.Draw(t, "id"), Category: text.Draw(t, "category"), Stream: text.Draw(t, "stream"), Version: rapid.Uint64().Draw(t, "version"),
				Position: eventstore.Position(rapid.Uint64().Draw(t, "position")), Type: text.Draw(t, "type"), Time: moment.Draw(t, "time"),
				Schema: rapid.IntRange(0, 1).Draw(t, "schema"),
			}
		}
		if rapid.Bool().Draw(t, "due") {
			at := moment.Draw(t, "at")
			p.Due = &at
		}
		if rapid.Bool().Draw(t, "result") {
			p.Result = raw.Draw(t, "result value")
		}
		if rapid.IntRange(0, 9).Draw(t, "reason") == 0 {
			p.Reason = text.Draw(t, "reason text")
		}
		want, wantErr := jsonv1.Marshal(&p)
		got, err := encodePayload(&p)
		require.Equal(t, wantErr == nil, err == nil)
		require.Equal(t, string(want), string(got))
	})
}
